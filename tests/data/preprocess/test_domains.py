import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from megapoly.config import load_yaml
from megapoly.data.builtin import builtin_documents
from megapoly.data.preprocess.domains import DomainOptions, prepare_domains
from megapoly.data.tokenizer import load_tokenizer
from megapoly.errors import DataError

QUIET = Console(quiet=True)


def write_domain(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def texts_of(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text().split("\n")[:-1]]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two domains of the built-in text's documents, prepared."""
    folder = tmp_path_factory.mktemp("domains")
    texts = [document.text[:3000] for document in builtin_documents()[:70]]
    write_domain(folder / "whales.jsonl", texts[:45])
    write_domain(folder / "kings.jsonl", texts[45:])
    prepare_domains(DomainOptions((folder,), folder / "out", vocab_size=400), QUIET)
    return folder


def test_every_twentieth_document_is_held_out(prepared: Path) -> None:
    texts = texts_of(prepared / "whales.jsonl")
    held_out = [texts[10], texts[30]]
    written = {
        split: texts_of(prepared / f"out/text/whales.{split}.jsonl")
        for split in ("train", "validation")
    }
    assert written["validation"] == held_out
    assert written["train"] == [text for text in texts if text not in held_out]


def test_the_recipe_names_token_files_of_the_texts(prepared: Path) -> None:
    recipe = yaml.safe_load((prepared / "out/data.yaml").read_text())["data"]
    assert [(s["name"], s["weight"]) for s in recipe["blend"]] == [("kings", 1), ("whales", 1)]
    assert list(recipe["validation"]) == ["kings", "whales"]
    tokenizer = load_tokenizer(recipe["tokenizer"])
    assert tokenizer.vocab_size == 400
    lines = (prepared / "out/text/whales.validation.jsonl").read_text().splitlines()
    expected = [
        id_
        for line in lines
        for id_ in [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eod]
    ]
    assert np.fromfile(recipe["validation"]["whales"] + ".bin", np.uint16).tolist() == expected
    assert load_yaml(prepared / "out/data.yaml").data.tokenizer == recipe["tokenizer"]


def test_what_is_complete_is_left_and_what_differs_is_refused(prepared: Path) -> None:
    options = DomainOptions((prepared,), prepared / "out", vocab_size=400)
    before = options.recipe.stat().st_mtime_ns
    prepare_domains(options, QUIET)
    assert options.recipe.stat().st_mtime_ns == before
    other = DomainOptions((prepared / "kings.jsonl",), prepared / "out", vocab_size=500)
    with pytest.raises(DataError, match="`input`, `vocab_size` differ"):
        prepare_domains(other, QUIET)


def test_a_domain_without_documents_to_hold_out_is_refused(tmp_path: Path) -> None:
    write_domain(tmp_path / "short.jsonl", ["a", "b", "c"])
    with pytest.raises(DataError, match=r"short\.jsonl has 3, of which every 20th is held out"):
        prepare_domains(DomainOptions((tmp_path,), tmp_path / "out"), QUIET)


def test_files_that_are_no_domains(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing does not"):
        prepare_domains(DomainOptions((tmp_path / "missing",), tmp_path / "out"), QUIET)
    with pytest.raises(DataError, match="found: none"):
        prepare_domains(DomainOptions((tmp_path,), tmp_path / "out"), QUIET)


def test_without_input_the_domains_are_the_authors(tmp_path: Path) -> None:
    prepare_domains(DomainOptions((), tmp_path, vocab_size=300, tokenizer_mb=0.1), QUIET)
    recipe = yaml.safe_load((tmp_path / "data.yaml").read_text())["data"]
    assert list(recipe["validation"]) == ["melville", "milton", "shakespeare"]
    held_out = [d for d in builtin_documents() if d.split == "validation"]
    lines = [
        json.loads(line)
        for name in recipe["validation"]
        for line in (tmp_path / f"text/{name}.validation.jsonl").read_text().splitlines()
    ]
    assert sorted(line["source"] for line in lines) == sorted(d.source for d in held_out)

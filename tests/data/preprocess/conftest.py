import pytest
from rich.console import Console

from megapoly.data.builtin import builtin_documents
from megapoly.data.preprocess.options import PreprocessOptions
from megapoly.data.preprocess.run import preprocess
from megapoly.data.preprocess.text_extraction import RecordRules

# Difficult texts between real ones: combining marks, scripts, names of special tokens, spaces.
HARD = [
    "a\u0301 \u1e9e",
    "日本語 \U0001f468\u200d\U0001f469",
    "<|endoftext|> here",
    " \n\t x  ",
    "\x00",
]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Real texts of 7 to 3,000 characters, with difficult ones between them."""
    sizes = [900, 40, 1500, 2100, 7, 1200, 333, 3000, 801]
    real = [d.text[: sizes[i % 9]] for i, d in enumerate(builtin_documents()[::6])]
    return [text for i, part in enumerate(real) for text in (part, *HARD[i::14])]


@pytest.fixture
def rules() -> RecordRules:
    return RecordRules(("text",), keep_empty=False, max_document_bytes=1 << 20)


@pytest.fixture
def run(tmp_path):
    """Run the preprocessor in this process, without output; options as in ``PreprocessOptions``."""

    def run(*inputs, prefix="out", **options):
        defaults = {"append_eod": True, "workers": 1, "part_bytes": 20_000}
        return preprocess(
            PreprocessOptions(
                input=tuple(map(str, inputs)),
                output_prefix=tmp_path / prefix,
                **(defaults | options),
            ),
            Console(quiet=True),
        )

    return run

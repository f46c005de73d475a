"""Dropout masks: which ranks draw the same ones, and what a resumed run draws."""

import hashlib
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812

from megapoly.config.recipes import FOLDER as RECIPES
from megapoly.data.corpus import load_corpus
from megapoly.data.tokenizer import load_tokenizer
from megapoly.model.attention import ScaledDotProductAttention
from megapoly.platform.device import select_platform
from megapoly.preflight.layouts import parse_layout
from megapoly.pretrain import configure
from megapoly.testing import run_on_ranks
from megapoly.testing.jobs import shared_cache
from megapoly.training.distributed import model_groups, process_group
from megapoly.training.load_checkpoint import load_checkpoint
from megapoly.training.random_state import preserved_random_state, seed_generators
from megapoly.training.rank_zero_first import RankZeroFirst
from megapoly.training.save_checkpoint import CheckpointSaver
from megapoly.training.state import build_state
from megapoly.training.step import train_step

SEED, P = 77, 0.25
OPTIONS = {
    "model.num_layers": 2,
    "model.hidden_size": 32,
    "model.num_attention_heads": 4,
    "model.hidden_dropout": P,
    "model.attention_dropout": P,
    "model.activation_backend": "reference",
    "training.seed": SEED,
    "training.train_iters": 4,
    "training.seq_length": 32,
    "training.micro_batch_size": 1,
    "training.global_batch_size": 2,
    "training.device": "cpu",
}
RECIPE = {
    "dense_tiny": OPTIONS | {"model.ffn_hidden_size": 48},
    "moe_tiny": OPTIONS | {"model.moe_ffn_hidden_size": 48},
}
LAYOUTS = {"dense_tiny": "cp2 tp2 tp2-nosp cp2-a2a pp2 dp2", "moe_tiny": "tp2-ep2-etp1 ep2"}


def train_at(recipe, folder):
    """Train on this rank, at one layout after the other; returns a dictionary of each layout."""
    platform, other, found = select_platform("cpu"), None, {}
    configs = {name: configuration(recipe, name, folder) for name in LAYOUTS[recipe].split()}
    first = next(iter(configs.values()))
    with process_group(first, platform) as store:
        with RankZeroFirst.of_job(store, first) as rank_zero_first:
            corpus = load_corpus(first, tokenizer=load_tokenizer(None), first=rank_zero_first.run)
        for name, config in configs.items():
            with model_groups(config):
                found[name], other = masks_of_run(config, platform, corpus, other)
    return found


def configuration(recipe, layout, folder):
    options = RECIPE[recipe] | parse_layout(layout).options
    options |= {"run_dir": folder / layout, "data.cache_dir": shared_cache().name}
    argv = [f"--{name}={value}" for name, value in options.items()]
    return configure(argv, default_recipe=RECIPES / f"{recipe}.yaml", program="pretrain")


def masks_of_run(config, platform, corpus, other):
    """Train three steps, the third in three ways: at once, resumed, resumed from ``other``."""
    state = build_state(config, platform, corpus)
    weights = b"".join(p.detach().numpy().tobytes() for c in state.chunks for p in c.parameters())
    found, batches = {"weights": hashlib.sha256(weights).hexdigest()}, state.training_batches()
    found["first"], found["shapes"] = masks_of_step(state, batches)
    train_step(state, batches)
    checkpoint = CheckpointSaver(state).save(in_background=False)
    found["third"], _ = masks_of_step(state, batches)
    for way, path in {"resumed": checkpoint, "from_other": other}.items():
        if path is not None:
            state = build_state(config, platform, corpus)
            seed_generators(SEED)
            load_checkpoint(state, path)
            found[way], _ = masks_of_step(state, state.training_batches())
    dist.barrier()
    return found, checkpoint


def masks_of_step(state, batches):
    """Return what dropout keeps in a step, of hidden states and of attention; and score shapes.

    Attention returns no mask. Each call is repeated from the same random state with equal scores
    and with v = 1 at one position in each channel: then the output is the mask.
    """
    masks, shapes = {"hidden": [], "attention": []}, []
    attend, dropout = ScaledDotProductAttention._attend, F.dropout

    def noting_attend(module, query, key, value):
        length, batch, heads, _ = key.shape
        one_hot = torch.eye(length).view(length, 1, 1, length).expand(-1, batch, heads, -1)
        with torch.no_grad(), preserved_random_state(state.platform):
            kept = attend(module, query * 0, key * 0, one_hot) != 0  # [q, b, heads, k]
        kept = kept.permute(1, 2, 0, 3)
        masks["attention"].append(kept[..., allowed(kept.shape)])
        shapes.append(kept.shape)
        return attend(module, query, key, value)

    def noting_dropout(x, p=0.5, training=True, inplace=False):
        with preserved_random_state(state.platform):
            masks["hidden"].append(dropout(torch.ones_like(x), p, training).detach() != 0)
        return dropout(x, p, training, inplace)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScaledDotProductAttention, "_attend", noting_attend)
        patch.setattr(F, "dropout", noting_dropout)
        train_step(state, batches)
    return masks, shapes


def allowed(shape):
    """Return the causal mask of [b, heads, q, k] scores, aligned at the last elements."""
    q, k = shape[-2:]
    return torch.ones(q, k, dtype=torch.bool).tril(k - q)


@pytest.fixture(
    scope="module", params=["dense_tiny", pytest.param("moe_tiny", marks=pytest.mark.slow)]
)
def ranks(request, tmp_path_factory):
    """What :func:`train_at` returns on each of two ranks, by layout: pairs of dictionaries."""
    folder = tmp_path_factory.mktemp(request.param)
    results = run_on_ranks(train_at, 2, request.param, folder, timeout_s=1000)
    return {layout: [rank[layout] for rank in results] for layout in results[0]}


def assert_independent(one, two):
    """Check that masks agree as often as two independent ones: p^2 + (1 - p)^2 of the elements."""
    compared = [(a, b) for a, b in itertools.product(one, two) if a.shape == b.shape]
    assert compared
    for a, b in compared:
        agreement = (a == b).double().mean().item()
        assert agreement == pytest.approx(P**2 + (1 - P) ** 2, abs=0.12)


def same(one, two):
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_ranks_with_other_tokens_draw_other_masks(ranks):
    """Without sequence parallelism tensor-parallel ranks have the same tokens, and other heads.

    The parts of a sequence that ranks have with "cp2" attend to different numbers of keys: their
    masks are compared with those of the seeds, below.
    """
    for layout, (one, two) in ranks.items():
        for kind in ("hidden", "attention"):
            assert one["first"][kind] and two["first"][kind]
            if (layout, kind) == ("tp2-nosp", "hidden"):
                assert same(one["first"][kind], two["first"][kind])
            elif (layout, kind) != ("cp2", "attention"):
                assert_independent(one["first"][kind], two["first"][kind])


def test_calls_of_a_rank_draw_other_masks(ranks):
    """Layers, and micro-batches."""
    for rank in itertools.chain(*ranks.values()):
        for kind, masks in rank["first"].items():
            assert len(masks) > 1
            for i, mask in enumerate(masks):
                assert_independent([mask], masks[:i] + masks[i + 1 :]), kind


def test_masks_are_those_of_the_documented_seeds(ranks):
    for layout, results in ranks.items():
        for rank, result in enumerate(results):
            tensor_rank = rank if "tp2" in layout else 0
            seed = SEED + 100_000 * (rank - tensor_rank)
            tracked = (
                seed + 2718 + tensor_rank
            )  # the engine's, for what tensor-parallel ranks share
            shares_sequence = "tp2" in layout and "nosp" not in layout
            first = result["first"]["hidden"][0]
            torch.manual_seed(tracked if shares_sequence else seed)
            assert torch.equal(F.dropout(torch.ones(first.shape), P) != 0, first), layout
            if not shares_sequence:  # there the embeddings have drawn from it before
                torch.manual_seed(tracked)
                kept = attention_mask(result["shapes"][0])
                assert torch.equal(kept, result["first"]["attention"][0]), layout


def attention_mask(shape):
    """Return the mask that torch's attention draws for [b, heads, q, k] scores."""
    batch, heads, q, k = shape
    scores = torch.zeros(batch, heads, q, 1), torch.zeros(batch, heads, k, 1)
    one_hot = torch.eye(k).expand(batch, heads, -1, -1)
    causal = allowed(shape)
    kept = F.scaled_dot_product_attention(*scores, one_hot, attn_mask=causal, dropout_p=P) != 0
    return kept[..., causal]


def test_replicas_have_the_same_initial_weights(ranks):
    for layout, (one, two) in ranks.items():
        if layout[:2] in ("dp", "cp"):
            assert one["weights"] == two["weights"], layout
        else:
            assert one["weights"] != two["weights"], layout  # a part of the model on each


def test_a_resumed_run_draws_the_masks_of_one_that_did_not_stop(ranks):
    for result in itertools.chain(*ranks.values()):
        for kind, masks in result["third"].items():
            assert same(masks, result["resumed"][kind])
            assert_independent(masks, result["first"][kind])


def test_at_another_layout_a_run_draws_neither_its_first_masks_nor_the_same_on_all_ranks(ranks):
    for layout, results in list(ranks.items())[1:]:
        for result in results:
            for kind, masks in result["from_other"].items():
                assert_independent(masks, result["first"][kind])
                assert_independent(masks, result["third"][kind])
        if layout != "tp2-nosp":
            assert_independent(*(result["from_other"]["hidden"] for result in results))

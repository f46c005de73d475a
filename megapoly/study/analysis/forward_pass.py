"""Run a checkpoint's model on its validation text and collect states and activations.

Import it after :func:`megapoly.platform.device.select_platform`: it imports the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megapoly.data.samples import SamplePool
from megapoly.errors import DataError
from megapoly.model.builder import decoder_layers, unwrap
from megapoly.model.ffn_activation import FFNActivation
from megapoly.study.analysis.activation_statistics import ActivationStatistics
from megapoly.study.analysis.learned_activation import LearnedActivation
from megapoly.study.analysis.similarity import LayerSimilarity
from megapoly.training.state import ModelState, evaluation_mode
from megapoly.training.telemetry import kind_of_ffn

# Layer, kind (ffn, experts, shared_experts), expert; None if the experts share coefficients.
Place = tuple[int, str, int | None]


@dataclass
class Findings:
    """Statistics that were collected on a text.

    Args:
        sets: name, fingerprints of the token files and number of tokens of each validation set.
        similarity: of the layers' hidden states; None if it was not requested.
        activations: by place; empty if they were not requested.
    """

    sets: list[dict[str, Any]]
    similarity: LayerSimilarity | None = None
    activations: dict[Place, ActivationStatistics] = field(default_factory=dict)


def run_on_text(
    state: ModelState,
    validation: Mapping[str, SamplePool],
    num_tokens: int,
    *,
    with_similarity: bool,
    with_activations: bool,
    on_progress: Callable[[int, int], None],
) -> Findings:
    """Run the model on an equal number of tokens of each set, one sample at a time.

    Args:
        state: a model in one process.
        validation: samples of the sets by name.
        num_tokens: of all sets in total; a set with fewer than its share is read completely.
        with_similarity: compare hidden states.
        with_activations: collect inputs and outputs of activations.
        on_progress: called with the number of tokens done and the total.

    Raises:
        DataError: there is no text.
    """
    model_config = state.config.model
    num_layers, num_experts = model_config.num_layers, model_config.num_moe_experts or 0
    part = -(-num_tokens // max(len(validation), 1))
    samples = {name: list(chosen_samples(pool, part)) for name, pool in validation.items()}
    total = sum(len(sample) for each in samples.values() for sample in each)
    if not total:
        raise DataError(
            "There is no text to run the model on: the run has no validation set with tokens. Give "
            "one, `--data.validation '{wiki: tokens/wiki}'`, or use `--parts rank coefficients`."
        )
    findings = Findings([_entry(name, validation[name], each) for name, each in samples.items()])
    if with_similarity:
        findings.similarity = LayerSimilarity(num_layers, num_experts)
    model = state.chunks[0]
    done = 0
    with evaluation_mode(state), ExitStack() as stack:
        seen = stack.enter_context(_states(model)) if with_similarity else {}
        if with_activations:
            findings.activations = stack.enter_context(_activations(model))
        for tokens in (sample for each in samples.values() for sample in each):
            ids = tokens[None].to(state.platform.device)
            model(ids, torch.arange(len(tokens), device=ids.device)[None], attention_mask=None)
            if findings.similarity is not None:
                _compare(findings.similarity, seen, num_layers)
            done += len(tokens)
            on_progress(done, total)
    return findings


def chosen_samples(pool: SamplePool, num_tokens: int) -> Iterator[Tensor]:
    """Yield [s] token ids of samples spread evenly over a set, at most ``num_tokens`` in total.

    Padding of the last sample of a file is left out.
    """
    sample_length = len(pool[0]["tokens"])
    count = min(-(-num_tokens // sample_length), len(pool))
    for k in range(count):
        sample = pool[k * len(pool) // count]
        (counted,) = sample["loss_mask"].nonzero(as_tuple=True)
        length = min(int(counted[-1]) + 1 if len(counted) else 0, num_tokens)
        if length:
            yield sample["tokens"][:length]
        num_tokens -= length


def _entry(name: str, pool: SamplePool, samples: list[Tensor]) -> dict[str, Any]:
    return {
        "name": name,
        "fingerprints": [token_file.fingerprint for token_file in pool.token_files],
        "tokens": sum(map(len, samples)),
    }


@contextmanager
def _states(model: torch.nn.Module) -> Iterator[dict[Any, Tensor]]:
    """Keep hidden states by number, [s, b, h], and by ("routing", layer) [s b, experts]."""
    seen: dict[Any, Tensor] = {}

    def keep(key: Any, part: int) -> Callable[[Any, Any, Any], None]:
        def hook(_: Any, __: Any, output: Any) -> None:
            seen[key] = output[part] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as hooks:
        embedding = unwrap(model).embedding
        hooks.callback(embedding.register_forward_hook(keep(0, 0)).remove)
        for i, layer in enumerate(decoder_layers([model])):
            hooks.callback(layer.register_forward_hook(keep(i + 1, 0)).remove)
            if hasattr(layer.mlp, "router"):
                router = layer.mlp.router.register_forward_hook(keep(("routing", i), 1))
                hooks.callback(router.remove)
        yield seen


def _compare(similarity: LayerSimilarity, seen: Mapping[Any, Tensor], num_layers: int) -> None:
    states = torch.stack([seen[i].flatten(0, 1) for i in range(num_layers + 1)])
    routing = None
    if ("routing", 0) in seen:
        routing = torch.stack([seen["routing", i] for i in range(num_layers)])
    similarity.add(states, routing)


@contextmanager
def _activations(model: torch.nn.Module) -> Iterator[dict[Place, ActivationStatistics]]:
    """Collect statistics by place while the model runs."""
    found: dict[Place, ActivationStatistics] = {}
    with ExitStack() as hooks:
        for i, layer in enumerate(decoder_layers([model])):
            for name, module in layer.named_modules():
                if isinstance(module, FFNActivation):
                    gather = _gatherer(found, i, kind_of_ffn(name, module))
                    hook = module.register_forward_pre_hook(gather, with_kwargs=True)
                    hooks.callback(hook.remove)
        yield found


def _gatherer(
    found: dict[Place, ActivationStatistics], layer: int, kind: str
) -> Callable[[Any, Any, Any], None]:
    def gather(module: FFNActivation, inputs: Any, options: dict[str, Any]) -> None:
        x: Tensor = inputs[0].flatten(0, -2)
        if not module.per_expert:
            _statistics(found, (layer, kind, None), module).add(x)
        elif options.get("expert") is not None:
            expert = options["expert"]
            _statistics(found, (layer, kind, expert), module).add(x)
        else:
            for expert, rows in enumerate(x.split(options["tokens_per_expert"].tolist())):
                _statistics(found, (layer, kind, expert), module).add(rows)

    return gather


def _statistics(
    found: dict[Place, ActivationStatistics], place: Place, module: FFNActivation
) -> ActivationStatistics:
    if place not in found:
        expert, settings = place[2], module.settings
        values = {name: getattr(module, name) for name in module.coefficient_names}
        if expert is not None:
            values = {name: value[expert] for name, value in values.items()}
        options = (
            {"eps": settings.eps, "norm": settings.norm} if module.activation.normalized else {}
        )
        found[place] = ActivationStatistics(LearnedActivation(module.activation, values, options))
    return found[place]

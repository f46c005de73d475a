"""Builds and trains models of Transformer Engine's layers on CPU, for test_transformer_engine.py.

    python te_job.py FOLDER_OF_THE_WHEEL OUTPUT

It writes the results of one process to OUTPUT, and of each of two ranks to OUTPUT with its number.
A separate process, because the engine looks for Transformer Engine when it is imported; it imports
once and forks the three.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
import types
from pathlib import Path

import te_kernels

from megapoly.testing.transformer_engine import import_without_kernels

folder, output = map(Path, sys.argv[1:])
package = import_without_kernels(folder, te_kernels.KERNELS)
# apex's kernel, which adds to the gradient of a weight.
sys.modules["fused_weight_gradient_mlp_cuda"] = types.SimpleNamespace(
    wgrad_gemm_accum_fp32=lambda x, grad, total: total.add_(grad.t() @ x)
)

import torch  # noqa: E402

from megapoly.platform import engine_workarounds  # noqa: E402
from megapoly.platform.device import select_platform  # noqa: E402

platform = select_platform("cpu")
engine_workarounds.install_with_transformer_engine()  # as on CUDA
te_kernels.install()

from layouts import result_of_model  # noqa: E402
from te_models import (  # noqa: E402
    BF16,
    EXPERTS,
    MODELS,
    SIZES,
    config_of,
    description,
    differences,
    first_step,
    fp8,
    gradients_with_rows_of,
    history_of_scales,
    there_and_back,
    trained,
)

from megapoly.preflight.local_ranks import environments  # noqa: E402
from megapoly.training.distributed import model_groups, process_group, process_groups  # noqa: E402

LAYOUTS = {
    "tensor": SIZES | {"parallel.tensor_model_parallel_size": 2},
    "tensor, expert": EXPERTS
    | {
        "parallel.tensor_model_parallel_size": 2,
        "parallel.expert_model_parallel_size": 2,
        "parallel.expert_tensor_parallel_size": 1,
        "model.qk_norm": "full",
    },
    "expert tensor": EXPERTS | {"parallel.tensor_model_parallel_size": 2},
}
RECOMPUTED = {
    "nothing": {},
    "layers": {
        "parallel.recompute_granularity": "full",
        "parallel.recompute_method": "uniform",
        "parallel.recompute_num_layers": 1,
    },
    "experts": {
        "parallel.recompute_granularity": "selective",
        "parallel.recompute_modules": ["moe"],
    },
}


CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)]
CUDAS = ["12.8", "12.9", "13.0"]


def recipes():
    """Which devices Transformer Engine lets a recipe run on, and what rows it fills up to."""
    from transformer_engine.common import recipe
    from transformer_engine.pytorch import quantization

    kinds = {
        "delayed": (recipe.DelayedScaling(), quantization.check_fp8_support),
        "tensorwise": (recipe.Float8CurrentScaling(), quantization.check_fp8_support),
        "blockwise": (recipe.Float8BlockScaling(), quantization.check_fp8_block_scaling_support),
        "mxfp8": (recipe.MXFP8BlockScaling(), quantization.check_mxfp8_support),
    }
    installed, found = torch.version.cuda, {}
    for name, (kind, check) in kinds.items():
        for capability in CAPABILITIES:
            quantization.get_device_compute_capability = lambda capability=capability: capability
            for torch.version.cuda in CUDAS:
                found[name, capability, torch.version.cuda] = check.__wrapped__()[0]
        found[name] = quantization.get_align_size_for_quantization(kind)
    torch.version.cuda = installed
    quantization.get_device_compute_capability = lambda: (9, 0)
    return found


def on_one_process():
    results = {"version": package.__version__, "recipes": recipes()}
    with process_groups(config_of(SIZES, platform), platform):
        results["models"] = {
            name: [
                description(config_of(options, platform, local=local)) for local in (False, True)
            ]
            for name, options in MODELS.items()
        }
        local = {
            name: first_step(config_of(options, platform, local=True), platform)
            for name, options in MODELS.items()
        }
        results["first steps"] = {
            name: differences(first_step(config_of(options, platform), platform), local[name])
            for name, options in MODELS.items()
        }
        fused = SIZES | {"training.gradient_accumulation_fusion": True}
        results["first steps"]["fused gradients"] = differences(
            first_step(config_of(fused, platform), platform), local["dense"]
        )
        results["layouts"] = {
            name: first_step(config_of(_of_one(options), platform, local=True), platform)
            for name, options in LAYOUTS.items()
        }
        results["recomputed"] = {
            name: trained(config_of(EXPERTS | fp8("tensorwise") | options, platform), platform, 2)
            for name, options in RECOMPUTED.items()
        }
        te_kernels.quantized.clear()
        results["fp8"] = {
            (name, recipe): [
                trained(config_of(MODELS[name] | options, platform), platform, 3)
                for options in (BF16, fp8(recipe))
            ]
            for name in ("dense", "experts", "one after another")
            for recipe in ("tensorwise", "delayed")
        }
        results["quantized"] = {str(dtype) for dtype in te_kernels.quantized}
        experts = MODELS["coefficients of experts"] | fp8("tensorwise")
        results["padding"] = []
        for te_kernels.unit in (1, 16):
            config = config_of(experts, platform)
            found = gradients_with_rows_of(te_kernels.unit, config, platform)
            results["padding"].append(found)
        with tempfile.TemporaryDirectory() as here:
            results["there and back"] = there_and_back(MODELS["experts"], platform, f"{here}/a")
            results["history"] = history_of_scales(platform, f"{here}/b")
    return results


def _of_one(options):
    return {key: value for key, value in options.items() if not key.startswith("parallel.")}


sums = []  # of PolyNorm's statistics, over ranks


def count_sums():
    from megapoly.ops import collectives

    all_reduce = torch.distributed.all_reduce

    def counted(*args, **kwargs):
        if sys._getframe(1).f_globals["__name__"] == collectives.__name__:
            sums.append(kwargs)
        return all_reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted


def on_two_ranks():
    count_sums()
    configs = {name: config_of(options, platform) for name, options in LAYOUTS.items()}
    results = {}
    with process_group(next(iter(configs.values())), platform):
        for name, config in configs.items():
            with model_groups(config):
                results[name] = (result_of_model(config, platform), description(config))
        with model_groups(configs["tensor"]):
            for name in ("nothing", "layers"):
                options = LAYOUTS["tensor"] | fp8("tensorwise") | RECOMPUTED[name]
                sums.clear()
                losses = trained(config_of(options, platform), platform, 2)
                results[f"recomputed {name}"] = (losses, len(sums))
    return results


def forked(job, place, file):
    """Return the id of a process that saves the results of a job in a file."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ.update(place)
            torch.save(job(), file)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


torch.set_num_threads(1)
pids = [forked(on_one_process, {}, output)]
with environments(2) as of_ranks:
    pids += [forked(on_two_ranks, each, f"{output}{each['RANK']}") for each in of_ranks]
    statuses = [os.waitpid(pid, 0)[1] for pid in pids]
sys.exit(any(statuses))

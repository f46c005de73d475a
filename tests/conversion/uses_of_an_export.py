"""What users do with an export, in whichever transformers is on the path; prints figures as JSON.

python uses_of_an_export.py WORK FOLDER ...

Two more processes, forks of the first, cut the models with tp_plan="auto".
"""

import inspect
import json
import os
import sys
import traceback
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "Call me Ishmael. Some years ago"


def load(folder, **options):
    return AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32, **options
    )


def largest(difference):
    return difference.abs().max().item()


def generated(model, ids, mask=None, **options):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=-1,
        pad_token_id=0,
        **options,
    )


def scores(model, ids, **options):
    """Return the logits [new tokens, vocab] that a greedy continuation chooses from."""
    given = {"output_logits": True, "return_dict_in_generate": True}
    return torch.cat(generated(model, ids, **given, **options).logits)


def gradients(model, ids, checkpointing):
    model.train()
    model.zero_grad()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    loss = model(ids, labels=ids, use_cache=False).loss
    loss.backward()
    return loss.item(), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


def trained(model, ids):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def uses(folder, work):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    inputs = tokenizer(TEXT, return_tensors="pt")
    ids = inputs["input_ids"]
    model = load(folder)
    with torch.no_grad():
        logits = model(**inputs).logits
        eager = load(folder, attn_implementation="eager")(
            **inputs, output_attentions=True, output_hidden_states=True
        )
        last = model(**inputs, logits_to_keep=1).logits
        placed = model(ids, position_ids=torch.arange(7, 7 + ids.shape[1])[None]).logits
        as_tuple = model(**inputs, return_dict=False)
    torch.save(logits, work / f"{folder.name}-{transformers.__version__}.pt")
    continued, of_cache = generated(model, ids), scores(model, ids)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    both = tokenizer([TEXT, "The"], return_tensors="pt", padding=True)
    padded = generated(model, both["input_ids"], both["attention_mask"])
    alone = generated(model, tokenizer("The", return_tensors="pt")["input_ids"])
    plain_loss, plain = gradients(model, ids, checkpointing=False)
    loss, recomputed = gradients(model, ids, checkpointing=True)
    while_training = scores(model, ids)
    model.gradient_checkpointing_disable()
    model.eval()
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu"}
    places |= dict.fromkeys([f"model.layers.{i}" for i in (1, 2, 3)], "disk")
    places |= {"model.norm": "cpu", "lm_head": "disk"}
    offloaded = load(folder, device_map=places, offload_folder=work / "offload")
    with torch.no_grad():
        of_offloaded = offloaded(**inputs).logits
        model.save_pretrained(work / "saved")
        again, info = AutoModelForCausalLM.from_pretrained(
            work / "saved", trust_remote_code=True, dtype=torch.float32, output_loading_info=True
        )
        # Files are mapped, which puts weights anywhere; products are summed by where they lie.
        for parameter in (*model.parameters(), *again.parameters()):
            parameter.data = parameter.data.clone()
        saved, of_again = model(**inputs).logits, again(**inputs).logits
        made = AutoModelForCausalLM.from_config(model.config, trust_remote_code=True)
        of_made = made(ids, labels=ids).loss.item()
    return {
        "ids": ids[0].tolist(),
        "eager": largest(eager.logits - logits),
        "attention_sums": largest(eager.attentions[0].sum(-1) - 1.0),
        "hidden_states": len(eager.hidden_states),
        "placed": largest(placed - logits),  # rotary positions are relative
        "tuple": torch.equal(as_tuple[0], logits),
        "signature": sorted(inspect.signature(model.forward).parameters),
        "generated_with_router": torch.equal(
            continued, generated(model, ids, output_router_logits=True)
        ),
        "last": largest(last - logits[:, -1:]),
        "without_cache": largest(scores(model, ids, use_cache=False) - of_cache),
        "in_static_cache": largest(scores(model, ids, cache_implementation="static") - of_cache),
        "while_training": largest(while_training - of_cache),
        "same_beams_without_cache": torch.equal(
            generated(model, ids, num_beams=3), generated(model, ids, num_beams=3, use_cache=False)
        ),
        "same_padded": torch.equal(padded[1, -10:], alone[0, -10:]),
        "same_with_others": torch.equal(padded[0, -10:], continued[0, -10:]),
        "recomputed_loss": abs(loss - plain_loss),
        "recomputed": max(largest(recomputed[n] - g) for n, g in plain.items()),
        "without_gradient": sorted(set(dict(model.named_parameters())) - set(plain)),
        "devices": sorted(map(str, set(offloaded.hf_device_map.values()))),
        "offloaded": largest(of_offloaded - logits),
        "saved": largest(of_again - saved),
        "loading": sorted(map(str, [*info["missing_keys"], *info["unexpected_keys"]])),
        "made_loss": of_made,
        "losses": trained(model, ids),
    }


def tensor_parallel(folder):
    import warnings

    warnings.filterwarnings("ignore")
    ids = torch.arange(40).view(2, 20) * 37 % 4000
    model = load(folder, tp_plan="auto")
    with torch.no_grad():
        logits = model(ids).logits
        alone = load(folder)(ids).logits
    if hasattr(logits, "full_tensor"):
        logits = logits.full_tensor()
    weights = dict(model.named_parameters())

    def share(name):
        weight = weights[name]
        local = weight.to_local() if hasattr(weight, "to_local") else weight
        return local.numel()

    layer = "model.layers.0."
    up = next(n for n in weights if n.startswith(layer) and n.endswith("up_proj.weight"))
    return {
        "difference": largest(logits - alone),
        "query": share(f"{layer}self_attn.q_proj.weight"),
        "up": share(up),
    }


def forked_rank(rank, folders, meeting):
    """Return the id of a process that is a rank of two; the first writes its figures."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
            torch.distributed.init_process_group(
                "gloo", init_method=f"file://{meeting}", rank=rank, world_size=2
            )
            figures = {folder.name: tensor_parallel(folder) for folder in folders}
            if rank == 0:
                figures_of_ranks(meeting).write_text(json.dumps(figures))
            torch.distributed.destroy_process_group()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    return pid


def figures_of_ranks(meeting):
    return meeting.with_suffix(".json")


def main():
    torch.set_num_threads(1)
    work, folders = Path(sys.argv[1]), [Path(arg) for arg in sys.argv[2:]]
    meeting = work.resolve() / f"ranks-{transformers.__version__}.meeting"
    ranks = [forked_rank(rank, folders, meeting) for rank in range(2)]
    figures = {folder.name: uses(folder, work) for folder in folders}
    if any([os.waitpid(pid, 0)[1] for pid in ranks]):
        sys.exit(1)
    cut = json.loads(figures_of_ranks(meeting).read_text())
    print(json.dumps({"transformers": transformers.__version__, "whole": figures, "cut": cut}))


if __name__ == "__main__":
    main()

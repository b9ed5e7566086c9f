"""One training, alone or by several processes over gloo or NCCL, and what else a model in processes is asked; for test_sharded.

    python by_processes.py RANK WORLD DEVICE FOLDER NAME…

runs these trainings and questions, each into a folder of its name under FOLDER, which holds the models. The batch of a step
is split among processes as one process accumulates it, so that all runs train on the same.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

import attribution
from attribution.causes import ablate, attribute
from attribution.components import Component
from attribution.errors import AttributionError
from attribution.models import anatomy
from attribution.samples import ProbeSet, Sample, collate, encode
from attribution.store import BESIDE
from attribution.updates.graft import graft, graft_sets
from attribution.updates.recorder import Recorder

SIZE = 12  # samples of a step
SETS = {"two": [Component("head", 0, 1), Component("neuron", 1, 3)], "row": [Component("row", -1, 5)]}


class Training(NamedTuple):
    """How a model is trained.

    Attributes:
        model: its folder.
        way: "fsdp" or "ddp".
        accumulation: micro-batches of a step in each process.
        steps: optimizer steps.
        metric: read on probe sets.
        options: of the recorder, besides.
    """

    model: str
    way: str
    accumulation: int = 1
    steps: int = 3
    options: Mapping[str, Any] = MappingProxyType({})


FULL = {"reference": "mean", "beside": BESIDE, "everything": True}
TRAININGS = {
    "fsdp": Training("llama", "fsdp", options=FULL),
    "fsdp tied": Training("llama-tied", "fsdp", accumulation=2),
    "ddp tied": Training("llama-tied", "ddp", accumulation=2),
    "ddp lora": Training("llama", "ddp", steps=2),
    "fsdp gpt2": Training("gpt2", "fsdp", steps=2),
    "fsdp by a trainer": Training("llama", "fsdp"),
    "ddp by a trainer": Training("llama", "ddp"),
}


def samples(count: int, first: int) -> list[Sample]:
    """Of different lengths; the same word stands in several, so that embeddings meet."""
    words = [f"w{(3 * place + first) % 17}" for place in range(4 * count + 3)]
    return [
        Sample(prompt=" ".join(words[4 * i : 4 * i + 2 + i % 2]), response=f" {words[4 * i + 3]} {words[4 * i + 5]}")
        for i in range(count)
    ]


def probe_sets() -> list[ProbeSet]:
    counterfactuals = samples(4, 9)
    return [
        ProbeSet(name="one", samples=samples(4, 1), counterfactuals=counterfactuals),
        ProbeSet(name="other", samples=samples(5, 6), counterfactuals=counterfactuals),
    ]


def opened(folder: Path, name: str):
    model = AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # processes would draw otherwise than one does
    return model, AutoTokenizer.from_pretrained(folder / name)


def sharded(model: torch.nn.Module, **how) -> torch.nn.Module:
    for layer in anatomy(model).layers:
        fully_shard(layer, **how)
    return fully_shard(model, **how)


def full(parameter: torch.Tensor) -> torch.Tensor:
    return (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()


def train(
    folder: Path, name: str, path: Path | None, rank: int = 0, world: int = 1, parts: int = 1, device: str = "cpu"
) -> dict:
    """Train, recording into `path` or not; weights afterwards by name, whole.

    Args:
        world: processes that train together; of one alone, `parts` are the processes that it stands for.
    """
    given, together = TRAININGS[name], dist.is_initialized()
    model, tokenizer = opened(folder, given.model)
    model = model.to(device)
    torch.manual_seed(3)
    if "lora" in name:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"]))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.1)
    model.train()
    inner = model
    if together:
        model = sharded(model) if given.way == "fsdp" else torch.nn.parallel.DistributedDataParallel(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    encoded = encode(tokenizer, samples(24, 4))
    recorder = None
    if path is not None:
        recorder = Recorder(path, probes=probe_sets(), tokenizer=tokenizer, sets=SETS, **given.options)
    with recorder.attach(model, optimizer) if recorder else nullcontext():
        for step in range(given.steps):
            optimizer.zero_grad()
            chosen = [encoded[(step * SIZE + i) % len(encoded)] for i in range(SIZE)]
            mine = [chosen[rank::world]] if together else [chosen[part::parts] for part in range(parts)]
            parted = [each[part :: given.accumulation] for each in mine for part in range(given.accumulation)]
            batches = [collate(each, device) for each in parted]
            for number, batch in enumerate(batches):
                last = number == len(batches) - 1
                if together and given.way == "fsdp":
                    inner.set_requires_gradient_sync(last)
                with model.no_sync() if together and given.way == "ddp" and not last else nullcontext():
                    out = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels)
                    (out.loss / len(batches)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
    return {key.removeprefix("module."): full(p) for key, p in model.named_parameters()}


def train_by_a_trainer(
    folder: Path, name: str, path: Path | None, rank: int = 0, world: int = 1, parts: int = 1, device: str = "cpu"
) -> dict:
    """The same by TRL's SFTTrainer, which shards through transformers, or wraps for DDP itself; in float32."""
    from datasets import Dataset
    from transformers.distributed import DistributedConfig
    from trl import SFTConfig, SFTTrainer

    from attribution.updates.callback import RecorderCallback

    given, how = TRAININGS[name], {}
    if dist.is_initialized() and given.way == "fsdp":
        how = {"distributed_config": DistributedConfig(fsdp_size=world)}
    model = AutoModelForCausalLM.from_pretrained(folder / given.model, **how)
    tokenizer = AutoTokenizer.from_pretrained(folder / given.model)
    arguments = SFTConfig(
        output_dir=str(folder / name / "out"), max_steps=given.steps, per_device_train_batch_size=SIZE // 2, bf16=False,
        gradient_accumulation_steps=parts, learning_rate=1e-3, activation_checkpointing=False, report_to="none",
        save_strategy="no", use_cpu=device == "cpu", dataloader_pin_memory=False, logging_steps=1, disable_tqdm=True,
        max_length=None, seed=3, lr_scheduler_type="constant", max_grad_norm=0.5,
    )  # fmt: skip
    rows = [{"input_ids": list(e.ids), "labels": e.labels} for e in encode(tokenizer, samples(24, 4))]
    callbacks = [] if path is None else [RecorderCallback(path, probes=probe_sets(), tokenizer=tokenizer, sets=SETS)]
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train()
    return {key.removeprefix("module."): full(p) for key, p in model.named_parameters()}


def ask(folder: Path, device: str = "cpu") -> dict:
    """Causes and grafts of the model, sharded among the processes where there are such."""
    model, tokenizer = opened(folder, "llama")
    tuned, _ = opened(folder, "llama-other")
    model, tuned = model.to(device), tuned.to(device)
    if dist.is_initialized():
        model, tuned = sharded(model), sharded(tuned)
    given, other = samples(4, 1), samples(4, 9)
    sets = {"two": [Component("head", 0, 1), Component("neuron", 1, 3), Component("row", -1, 5)]}
    found = {
        f"{method} {reference}": attribute(
            model, tokenizer, given, method=method, reference=reference, counterfactuals=other
        ).table["effect"]
        for method, reference in (("ablation", "zero"), ("gradient", "mean"))
    }
    found["sets"] = ablate(model, tokenizer, given, sets)[["effect", "kl"]].iloc[0]
    wanted = {**sets, "remainder": "remainder"}
    found["graft"] = graft(model, tuned, wanted, tokenizer=tokenizer, probes=probe_sets())[["graft", "prune"]].stack()
    found["graft sets"] = graft_sets(model, tuned, {"two": sets["two"][:2]}, tokenizer=tokenizer, probes=probe_sets())["graft"]
    return {name: list(map(float, values)) for name, values in found.items()}


def refused(folder: Path, rank: int) -> dict:
    """The sentence of every training and question that is refused in two processes, by what it is."""

    def told(act) -> str:
        try:
            act()
        except AttributionError as error:
            return f"{type(error).__name__}: {error}"
        return ""

    def attach(model, path="refused", **given):
        with Recorder(folder / path, **given).attach(model, torch.optim.SGD(model.parameters(), lr=0.1)) as recorder:
            return recorder

    def hybrid():
        attach(sharded(opened(folder, "llama")[0], mesh=init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b"))))

    def in_part():
        model = opened(folder, "llama")[0]
        for layer in anatomy(model).layers:
            fully_shard(layer)
        attach(model)

    def columns():
        from torch.distributed.tensor import Shard

        attach(sharded(opened(folder, "llama")[0], shard_placement_fn=lambda p: Shard(p.ndim - 1)))

    def frozen():
        model = opened(folder, "llama")[0]
        model.get_input_embeddings().weight.requires_grad_(False)
        attach(sharded(model))

    def divided():
        model = sharded(opened(folder, "llama")[0])
        model.set_gradient_divide_factor(1.0)
        attach(model)

    def experts():
        attach(sharded(opened(folder, "mixtral")[0]))

    def apart():
        model = opened(folder, "llama")[0]
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1 + rank)
        attach(model)

    def not_averaged():
        model, tokenizer = opened(folder, "llama")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = collate(encode(tokenizer, samples(4, rank)))
        with Recorder(folder / "apart").attach(model, optimizer):
            model(input_ids=batch.ids, labels=batch.labels).loss.backward()
            optimizer.step()

    def rounded():
        model, tokenizer = opened(folder, "llama")
        model = sharded(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batch = collate(encode(tokenizer, samples(4, rank)))
        with Recorder(folder / "rounded").attach(model, optimizer):  # not refused, but said
            model(input_ids=batch.ids, labels=batch.labels).loss.backward()
            optimizer.step()

    def saved():
        attach(sharded(opened(folder, "llama")[0]), "saved").save(folder)

    def there():
        attach(sharded(opened(folder, "llama")[0]), "llama")  # a folder that holds no run

    def tied():
        model, tokenizer = opened(folder, "llama-tied")
        sets = {"one": [Component("head", 0, 1)]}
        graft(sharded(model), sharded(opened(folder, "llama-tied")[0]), sets, tokenizer=tokenizer, probes=probe_sets())

    def integrated():
        model, tokenizer = opened(folder, "llama")
        attribute(sharded(model), tokenizer, samples(2, 1), method="integrated")

    acts = (hybrid, in_part, columns, frozen, divided, experts, apart, not_averaged, rounded, saved, there, tied, integrated)
    return {act.__name__: told(act) for act in acts}


def by(name: str):
    """What trains."""
    return train_by_a_trainer if "trainer" in name else train


def run(folder: Path, names: list[str], world: int = 2, device: str = "cpu") -> None:
    """Do these in so many processes, over gloo or, on GPUs, over NCCL, and wait for them."""
    (folder / "meeting").unlink(missing_ok=True)
    known = os.pathsep.join([str(Path(attribution.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": known}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""  # which FSDP would take where there are such
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(world), device, str(folder), *names], env=environment)
        for rank in range(world)
    ]
    try:
        while any(each.poll() is None for each in started):
            assert not any(each.poll() for each in started)  # one that failed leaves the others waiting for it
            time.sleep(0.1)
        assert [each.returncode for each in started] == [0] * world
    finally:
        for each in started:
            each.kill()


def main() -> None:
    rank, world, device, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29517"}  # accelerate asks for them, and finds the meeting held
    backend = "gloo"
    if device == "cuda":
        backend, device = "nccl", f"cuda:{rank}"
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=world)
    for name in sys.argv[5:]:
        place = folder / name
        if name in TRAININGS:
            for path in (place / "run", None):
                ends = by(name)(folder, name, path, rank, world, device=device)
                if rank == 0:
                    ends = {key: value.cpu() for key, value in ends.items()}
                    torch.save(ends, place / ("recorded.pt" if path else "bare.pt"))
        else:
            found = ask(folder, device) if name == "asked" else refused(folder, rank)
            place.mkdir(exist_ok=True)
            (place / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

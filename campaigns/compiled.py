"""The C++ of `omni/fast` under the address and undefined-behaviour sanitizers, compared with the reference.

Each case draws one of the three libraries, a shape, an input of some layout and type, and settings that a user may have:
torch's default type and device, gradients, the number of threads, a thread or a forked process to run in, weights that
another thread exchanges, memory that torch fills with NaN. The result equals the reference, or the input is refused. An
error of a sanitizer ends the process; so does a case that hangs. `Tally.failures` names such cases, and
`python -m campaigns.compiled SEED FROM TO` repeats them, without sanitizers.
"""

import copy
import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from itertools import pairwise
from pathlib import Path
from queue import Empty, Queue
from threading import Event, Thread
from typing import Any
from unittest.mock import patch

from campaigns.tally import Tally

SANITIZED = "-g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
HANGS = 180.0
"""A case without an outcome after so many seconds hangs."""

UNCHANGED, REFUSED = "unchanged", "refused"


class Wrong(Exception):
    """A result differs from the reference."""


def run(seed: int, count: int, seconds: float) -> Tally:
    """Try `count` cases, or as many as fit into the time.

    Raises:
        RuntimeError: this machine has no compiler with sanitizers, or a processor that the code does not support.
    """
    end, outcomes, failures, start = time.monotonic() + seconds, {UNCHANGED: 0, REFUSED: 0}, [], 0
    environment = _sanitized()
    _compile(environment)
    while start < count and time.monotonic() < end:
        case = start - 1
        for case, outcome in _answers(seed, start, count, end, environment):
            if outcome in outcomes:
                outcomes[outcome] += 1
            else:
                failures.append(f"compiled, seed {seed}, case {case}: {outcome}")
        if case < start and time.monotonic() < end:
            raise RuntimeError("The process that tries the cases does not start; see its output above.")
        start = case + 1
    tried = sum(outcomes.values()) + len(failures)
    return Tally(tried, outcomes[REFUSED], outcomes[UNCHANGED], tuple(failures))


def _sanitized() -> dict[str, str]:
    compiler = os.environ.get("CXX", "c++")
    libraries = []
    for name in ("libasan.so", "libstdc++.so.6"):
        try:
            command = [*shlex.split(compiler), f"-print-file-name={name}"]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise RuntimeError(
                f"Sanitizers need a C++ compiler, found none by the name {compiler!r}; set $CXX."
            ) from error
        if not Path(path := found.stdout.strip()).is_absolute():
            raise RuntimeError(f"The compiler {compiler!r} has no {name}; install its sanitizers, or set $CXX.")
        libraries.append(path)
    return {
        **os.environ,
        "CXX": f"{compiler} {SANITIZED}",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch hold memory until the process ends
        "OMP_NUM_THREADS": "2",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }


def _compile(environment: dict[str, str]) -> None:
    """Compile the libraries before the first case, whose time would not suffice."""
    modules = "compiled_encoder, compiled_layers, resizing"
    program = f"from omni.fast import {modules}; print(all(each._library() for each in ({modules})))"
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    if done.stdout.strip() != "True":
        reason = done.stderr[-2000:] or "the compiler fails, or takes more than five minutes"
        raise RuntimeError(f"The libraries cannot be compiled for the sanitizers here: {reason}.")


def _answers(seed: int, start: int, count: int, end: float, environment: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Yield cases and their outcomes from a new process until it ends; the last outcome may be how it ended."""
    command = [sys.executable, "-m", "campaigns.compiled", str(seed), str(start), str(count)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    lines: Queue[str | None] = Queue()
    errors: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    def overhear() -> None:
        assert process.stderr is not None
        errors.extend(process.stderr)

    listeners = [Thread(target=each, daemon=True) for each in (listen, overhear)]
    for each in listeners:
        each.start()
    case, answered = start - 1, True
    try:
        while time.monotonic() < end:
            try:
                line = lines.get(timeout=max(0, min(HANGS, end - time.monotonic())))
            except Empty:
                if time.monotonic() < end:
                    yield case, "hangs"
                return
            if line is None:
                listeners[1].join()
                if not answered:
                    yield case, _complaint(errors)
                elif process.wait():
                    sys.stderr.writelines(errors[-20:])
                return
            if line.startswith("{"):
                found = json.loads(line)
                case, answered = found["case"], found["outcome"] is not None
                if answered:
                    yield case, found["outcome"]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # the process and its forks
        process.wait()


def _complaint(errors: list[str]) -> str:
    """The error of a sanitizer in one line."""
    found = [line.strip() for line in errors if re.search(r"runtime error:|ERROR: \w+Sanitizer|SUMMARY:|Fatal", line)]
    return "; ".join(found[:3]) or "".join(errors[-3:]).strip() or "the process ended"


# --- In the other process ---------------------------------------------------------------------------------------------


def _try_cases(seed: int, start: int, stop: int) -> None:
    kinds: list[Callable[[random.Random], str]] = [
        _encode,
        _hear,
        _encode,
        _hear,
        _step,
        _resize,
        _refuse,
        _refuse_sounds,
    ]
    for case in range(start, stop):
        chance = random.Random(f"{seed}/{case}")
        _say(case, None)
        kind = chance.choice(kinds)
        try:
            outcome = kind(chance)
        except Exception as error:
            outcome = f"{kind.__name__.strip('_')}: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        _say(case, outcome)


def _say(case: int, outcome: str | None) -> None:
    print(json.dumps({"case": case, "outcome": outcome}), flush=True)  # noqa: T201


@contextmanager
def _surroundings(chance: random.Random) -> Iterator[None]:
    """Draw settings of torch that a user may choose, and restore them after the context."""
    import torch

    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(chance.randint(1, 4))
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(chance.choice([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
        if chance.random() < 0.3:
            stack.callback(torch.use_deterministic_algorithms, False)
            torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
        if chance.random() < 0.3:
            stack.enter_context(torch.device("meta"))
        stack.enter_context(chance.choice([torch.inference_mode, torch.no_grad, torch.enable_grad])())
        yield


def _called(chance: random.Random, call: Callable[[], Any]) -> list[Any]:
    """The results of the call, made here, in another thread, in several at once, or in a forked process."""
    import torch

    way = chance.choice(["here", "here", "thread", "threads", "fork"])
    if way == "here":
        return [call()]
    if way == "thread":
        with ThreadPoolExecutor(1) as pool:
            return [pool.submit(call).result()]
    if way == "threads":
        with ThreadPoolExecutor(3) as pool:
            return [each.result() for each in [pool.submit(call) for _ in range(6)]]
    before = call()  # starts threads, which a forked process does not have
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)  # as a DataLoader's worker does: with more, torch's own products wait forever
            os.write(writing, b"1" if _are_close(call(), before) else b"0")
            status = 0
        finally:
            os._exit(status)
    os.close(writing)
    verdict = os.read(reading, 1)
    os.close(reading)
    if os.waitpid(child, 0)[1] != 0 or verdict != b"1":
        raise Wrong(f"a forked process gets another result ({verdict!r})")
    return [before]


def _are_close(found: Any, expected: Any) -> bool:
    """Whether two results agree up to rounding, which depends on torch's number of threads."""
    import numpy as np

    one, other = np.array(found.tolist()), np.array(expected.tolist())
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-4, atol=1e-4))


def _laid_out(chance: random.Random, tensor: Any) -> Any:
    """The same tensor in another memory layout, or as a view of a larger one."""
    import torch

    way = chance.choice(["plain", "turned", "cut", "every second"])
    if way == "turned":
        order = chance.sample(range(tensor.ndim), tensor.ndim)
        back = [order.index(axis) for axis in range(tensor.ndim)]
        return tensor.permute(order).contiguous().permute(back)
    if way == "cut":
        return torch.nn.functional.pad(tensor, (1, 2, 2, 1))[..., 2:-1, 1:-2]
    if way == "every second":
        return tensor.repeat_interleave(2, dim=-1)[..., ::2]
    return tensor.clone()


# --- The encoder ------------------------------------------------------------------------------------------------------


def _encoder(chance: random.Random) -> tuple[Any, Any]:
    """A model of a shape that the compiled code supports, with weights that all matter, and its image processor."""
    import torch

    from omni import OmniImageProcessor, OmniVisionConfig, OmniVisionModel

    panel = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
    patch, heads, depth = chance.randint(1, 17), chance.randint(1, 3), panel * chance.randint(1, 2)
    config = OmniVisionConfig(
        image_size=patch * chance.randint(1, 11),
        patch_size=patch,
        num_channels=(channels := chance.choice([1, 3, 3, 4])),
        hidden_size=heads * depth,
        num_attention_heads=heads,
        num_hidden_layers=chance.randint(1, 3),
        intermediate_size=panel * chance.randint(1, 9),
    )
    torch.manual_seed(chance.randrange(1000))
    model = OmniVisionModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3) + ("norm" in name))
    means, stds = ([chance.uniform(low, 0.6) for _ in range(channels)] for low in (0.0, 0.2))
    return model, OmniImageProcessor(image_mean=means, image_std=stds)


def _encode(chance: random.Random) -> str:
    import torch

    from omni.fast.packing import PackedVisionModel

    model, processor = _encoder(chance)
    config, dtype = model.config, chance.choice([torch.float32, torch.float32, torch.bfloat16])
    side, count = config.image_size, chance.randint(0, 6)
    raw = torch.randint(0, 256, (count, side, side, config.num_channels), dtype=torch.uint8)
    mean, std = (torch.tensor(each, dtype=torch.float64) for each in (processor.image_mean, processor.image_std))
    pixels = ((raw.double() / 255 - mean) / std).permute(0, 3, 1, 2).float()
    as_bytes, cls_only = chance.random() < 0.5, chance.random() < 0.5
    given = _laid_out(chance, raw if as_bytes else pixels.to(chance.choice([torch.float32, torch.float64])))
    with torch.no_grad():
        expected = (
            model(pixels).last_hidden_state if count else torch.empty(0, 1 + config.num_patches, config.hidden_size)
        )
        half = copy.deepcopy(model).bfloat16()(pixels.bfloat16()).last_hidden_state.float() if count else expected
    with _surroundings(chance):
        packed = PackedVisionModel(model, processor, dtype)
        found = _called(chance, lambda: packed(given, cls_only=cls_only).last_hidden_state)
    if dtype == torch.float32 and packed.path != "compiled":
        raise Wrong("it does not run compiled")
    rows = expected[:, :1] if cls_only else expected
    allowed = 1e-4 if dtype == torch.float32 else 0.02 + 2 * float((half - expected).norm() / (expected.norm() + 1e-9))
    for each in found:
        if each.shape != rows.shape or not float((each.float() - rows).norm()) <= allowed * (float(rows.norm()) + 1e-9):
            raise Wrong(
                f"{count} pictures of {side}, patches of {config.patch_size}, in {dtype}, cls_only {cls_only}: "
                f"{tuple(each.shape)} off by {float((each - rows).norm())} of {float(rows.norm())}, {allowed} is allowed"
            )
    return UNCHANGED


def _hearing(chance: random.Random) -> tuple[Any, Any]:
    """A model of sounds of a shape that can be compiled, with weights that all matter, and its feature extractor."""
    import torch

    from omni import OmniAudioConfig, OmniAudioModel, OmniFeatureExtractor

    panel = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
    heads, depth = chance.randint(1, 3), panel * chance.randint(1, 2)
    config = OmniAudioConfig(
        num_mel_bins=chance.randint(2, 90),
        time_reduction=2 ** chance.randint(1, 6),
        position_embedding=chance.choice(["sinusoidal", "none"]),
        hidden_size=heads * depth,
        num_attention_heads=heads,
        num_hidden_layers=chance.randint(1, 3),
        intermediate_size=panel * chance.randint(1, 9),
    )
    torch.manual_seed(chance.randrange(1000))
    model = OmniAudioModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.08 if parameter.ndim > 1 else 0.3) + ("norm" in name))
    return model, OmniFeatureExtractor(num_mel_bins=config.num_mel_bins)


def _hear(chance: random.Random) -> str:
    import torch

    from omni.fast.packed_sounds import PackedAudioModel

    model, extractor = _hearing(chance)
    config, dtype = model.config, chance.choice([torch.float32, torch.float32, torch.bfloat16])
    most = chance.choice([3, 40, 400, 1500])
    features = [torch.randn(chance.randint(1, most), config.num_mel_bins) for _ in range(chance.randint(0, 6))]
    kind, cls_only = chance.choice([torch.float32, torch.float32, torch.float64]), chance.random() < 0.5
    given = [_laid_out(chance, each.to(kind)) for each in features]
    rows = slice(0, 1 if cls_only else None)
    with torch.no_grad():
        expected = [model(each[None]).last_hidden_state[0, rows] for each in features]
        halved = copy.deepcopy(model).bfloat16()
        half = [halved(each[None].bfloat16()).last_hidden_state[0, rows].float() for each in features]
    with _surroundings(chance):
        packed = PackedAudioModel(model, extractor, dtype)
        found = _called(chance, lambda: packed(given, cls_only=cls_only).last_hidden_state)
    if dtype == torch.float32 and packed.path != "compiled":
        raise Wrong("it is not compiled")
    for each in found:
        if len(each) != len(features):
            raise Wrong(f"{len(features)} sounds, {len(each)} results")
        for number, (one, usual) in enumerate(zip(expected, half, strict=True)):
            length, own = float(one.norm()) + 1e-9, each[number, : len(one)].float()
            allowed = 1e-4 if dtype == torch.float32 else 0.03 + 2 * float((usual - one).norm()) / length
            off, behind = float((own - one).norm()), bool(each[number, len(one) :].any())
            if not off <= allowed * length or behind:
                raise Wrong(
                    f"{[len(other) for other in features]} frames of {config.num_mel_bins} bands, {config.time_reduction} "
                    f"for a token, in {dtype}, CLS alone {cls_only}: sound {number} off by {off} of {length}, {allowed} is "
                    f"allowed; something behind it {behind}"
                )
    return UNCHANGED


# --- The layers of a Thinker ------------------------------------------------------------------------------------------


def _thinker(chance: random.Random) -> Any:
    import torch
    from transformers import AutoConfig, AutoModel

    groups, depth = chance.randint(1, 3), 16 * chance.randint(1, 3)
    heads = groups * chance.randint(1, 3)
    shape: dict[str, Any] = {
        "hidden_size": 16 * heads * chance.randint(1, 3),
        "intermediate_size": 16 * chance.randint(1, 8),
        "num_hidden_layers": chance.randint(1, 3),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "head_dim": depth,
        "vocab_size": 8,
    }
    kind = chance.choice(["llama", "mistral", "qwen3"])
    if kind == "llama":
        shape |= {"attention_bias": chance.random() < 0.5, "mlp_bias": chance.random() < 0.5}
    torch.manual_seed(chance.randrange(1000))
    model = AutoModel.from_config(AutoConfig.for_model(kind, **shape, sliding_window=None)).eval()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * (0.3 if parameter.ndim > 1 else 0.8)
    return model


def _step(chance: random.Random) -> str:
    import torch
    from transformers.cache_utils import DynamicCache

    from omni.fast.cache import give_room
    from omni.fast.compiled_layers import TOKENS
    from omni.fast.generation import quick_step, stepping

    model = _thinker(chance)
    batch, length = chance.choice([1, 1, 2, 5, 16, 20]), chance.randint(3, 90)
    embeds = torch.randn(batch, length, model.config.hidden_size)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, : chance.randrange(length)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions).last_hidden_state
    cuts = sorted({0, length, *(chance.randint(0, length) for _ in range(4))})
    way = chance.choice(["exchanged", "exchanged", "changed", "changed", *["plain"] * 6])
    if way == "exchanged":  # machine code holds the weights that it reads; what torch computes itself does not
        batch = min(batch, 16)
        embeds, mask, positions, expected = (each[:batch] for each in (embeds, mask, positions, expected))
        cuts = [*range(0, length, TOKENS // batch), length]
    layers = model.layers
    if way == "changed":  # a layer that is not like the first
        weight = layers[-1].mlp.up_proj.weight
        layers[-1].mlp.up_proj.weight = torch.nn.Parameter(weight.detach().repeat_interleave(2, dim=1)[:, ::2])

    def write() -> torch.Tensor:
        cache = give_room(DynamicCache(config=model.config))
        with torch.no_grad(), stepping(model):
            parts = []
            for start, stop in pairwise(cuts):
                step = quick_step(model, cache, embeds[:, start:stop], mask[:, :stop], {})
                if step is None or (step.compiled is None and way != "changed"):
                    raise Wrong("it is not compiled")
                some = positions[:, start:stop]
                parts.append(step(_laid_out(chance, embeds[:, start:stop]), mask[:, :stop], some, cache))
            return torch.cat(parts, dim=1)

    with _surroundings(chance), _exchanging(model) if way == "exchanged" else nullcontext():
        found = _called(chance, write)
    for each in found:
        difference = (each - expected)[mask.bool()].abs().max()
        if not float(difference) <= 1e-4 * float(expected.abs().max()):
            raise Wrong(f"{model.config.to_diff_dict()}, {batch} x {length} at {cuts}: off by {float(difference)}")
    return UNCHANGED


@contextmanager
def _exchanging(model: Any) -> Iterator[None]:
    """Inside, another thread gives the weights new memory again and again, as moving or loading a model does.

    All steps must be compiled: torch's own operations read freed memory then, and so may end the process.
    """
    import torch

    from omni.fast.generation import stepping

    with torch.no_grad(), stepping(model):  # a step is compared with the model once
        pass
    done = Event()

    def exchange() -> None:
        while not done.is_set():
            for parameter in model.parameters():
                parameter.data = parameter.data.clone()

    thread = Thread(target=exchange)
    thread.start()
    try:
        with patch("omni.fast.quick_step._norm", side_effect=Wrong("a step meets weights that it cannot hold")):
            yield
    finally:
        done.set()
        thread.join()


# --- Scaling ----------------------------------------------------------------------------------------------------------


def _resize(chance: random.Random) -> str:
    import numpy as np
    import torch
    from PIL import Image

    from omni.fast.resizing import resize

    most = chance.choice([3, 40, 900])
    (height, width), (new_height, new_width) = ([chance.randint(1, most) for _ in "hw"] for _ in range(2))
    values = np.random.default_rng(chance.randrange(1000)).integers(0, 256, (height, width, 4), dtype=np.uint8)
    if chance.random() < 0.3:
        values = values // 128 * 255
    picture = Image.fromarray(values[..., :3])
    expected = np.asarray(picture.resize((new_width, new_height), Image.Resampling.BILINEAR))
    given = picture if chance.random() < 0.4 else _laid_out(chance, torch.from_numpy(values)).numpy()
    with _surroundings(chance):
        found = _called(chance, lambda: resize(given, new_width, new_height, Image.Resampling.BILINEAR))
    for each in found:
        if not np.array_equal(each, expected):
            raise Wrong(f"{width}x{height} to {new_width}x{new_height}: other bytes")
    return UNCHANGED


# --- Wrong inputs -----------------------------------------------------------------------------------------------------


def _refuse(chance: random.Random) -> str:
    """Pictures, weights and sizes that do not fit: each raises an error and touches no other memory."""
    import numpy as np
    import torch

    from omni.fast.packing import PackedVisionModel, pack
    from omni.fast.resizing import resize

    model, processor = _encoder(chance)
    side, channels = model.config.image_size, model.config.num_channels
    packed = PackedVisionModel(model, processor)
    pictures = torch.zeros(2, side, side, channels, dtype=torch.uint8)
    inputs: list[Callable[[], Any]] = [
        lambda: packed(pictures.to("meta")),
        lambda: packed(pictures[:, :, 1:]),
        lambda: packed(torch.zeros(2, side, side, channels + 1, dtype=torch.uint8)),
        lambda: packed(pictures.to(chance.choice([torch.int8, torch.int64, torch.bool, torch.complex64]))),
        lambda: packed(pictures.float()[..., :0]),
        lambda: packed(pictures.to_sparse()),
        lambda: resize(np.zeros((5, 7, 4), np.uint8), 0, 3, 2),
        lambda: resize(np.zeros((5, 7, 4), np.float32), 3, 3, 2),
    ]

    def cut() -> Any:
        layer = model.layers[-1]
        layer.mlp.fc1 = torch.nn.Linear(model.config.hidden_size, 8)
        if pack(model, processor, torch.float32) is not None:
            raise Wrong("a model with cut weights is packed")
        return PackedVisionModel(model, processor)

    try:
        with torch.no_grad():
            chance.choice([*inputs, cut])()
    except (ValueError, BufferError, TypeError, NotImplementedError):
        return REFUSED
    raise Wrong("it was not refused")


def _refuse_sounds(chance: random.Random) -> str:
    """Features and weights that are none of ours."""
    import torch

    from omni.fast.packed_sounds import PackedAudioModel, pack

    model, extractor = _hearing(chance)
    bands = model.config.num_mel_bins
    packed, features = PackedAudioModel(model, extractor), torch.zeros(20, bands)
    inputs: list[Callable[[], Any]] = [
        lambda: packed([features, features.to("meta")]),
        lambda: packed([features[:, 1:]]),
        lambda: packed([torch.zeros(20, bands + 1)]),
        lambda: packed([features[:0], features]),
        lambda: packed([features.to(chance.choice([torch.int8, torch.int64, torch.bool, torch.complex64]))]),
        lambda: packed([features[None]]),
        lambda: packed([features.to_sparse()]),
    ]

    def cut() -> Any:
        model.layers[-1].mlp.fc1 = torch.nn.Linear(model.config.hidden_size, 8)
        if pack(model, extractor, torch.float32) is not None:
            raise Wrong("a model whose weights are cut is packed")
        return PackedAudioModel(model, extractor)

    try:
        with torch.no_grad():
            chance.choice([*inputs, cut])()
    except (ValueError, BufferError, TypeError, NotImplementedError):
        return REFUSED
    raise Wrong("it was not refused")


if __name__ == "__main__":
    _try_cases(*map(int, sys.argv[1:4]))

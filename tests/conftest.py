"""Commands in this process, and tiny models of every kind, built when a test asks for them."""

import gc
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here may need the network
if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of one thread, also of what tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")


LONGEST = (
    "tests/teaching/test_teach.py",
    "tests/app/test_page.py",
    "tests/embedding/test_cluster.py",
    "tests/test_plugin_package.py",
    "tests/test_deletions.py",
    "tests/training/test_recipes.py",
    "tests/test_readme.py",
    "tests/evaluation/test_other_drawings.py",
    "tests/exchange/test_onnx.py",
    "tests/training/test_processes.py",
    "tests/scenes/test_scenes.py",
    "tests/fusion/test_modeling_omni.py",
    "tests/test_cli.py",
    "tests/vision/test_modeling_vision.py",
    "tests/embedding/test_job.py",
    "tests/test_contract.py",
    "tests/test_sharing.py",
    "tests/serving/test_server.py",
    "tests/training/test_interruption.py",
    "tests/exchange/test_compose.py",
    "tests/evaluation/test_result.py",
    "tests/benchmarks/test_command.py",
    "tests/training/test_stages.py",
    "tests/embedding/test_embed_command.py",
    "tests/training/test_cache.py",
    "tests/test_examples.py",
    "tests/test_site.py",
    "tests/test_auto.py",
    "tests/audio/test_encoders.py",
)
"""Files that take longest. They begin, so that no process works on one of them at the end, alone."""


def pytest_configure(config: pytest.Config) -> None:
    """Without this, xdist begins with the files that have the most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(places)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    from omni.fusion.placeholders import UNMARKED

    if not UNMARKED and item.get_closest_marker("new_chats"):
        pytest.skip("omni refuses such chats before transformers 5.23")


def pytest_collection_finish() -> None:
    """Exempt the half a million objects of torch, transformers and the tests from garbage collection."""
    gc.collect()
    gc.freeze()


@contextmanager
def web_servers(*handlers: type[BaseHTTPRequestHandler]) -> Iterator[int]:
    """The port of web servers: the first at 127.0.0.1, the next at 127.0.0.2 with the same port, and so on."""
    servers: list[ThreadingHTTPServer] = []
    for number, handler in enumerate(handlers, start=1):
        port = servers[0].server_port if servers else 0
        servers.append(ThreadingHTTPServer((f"127.0.0.{number}", port), handler))
        threading.Thread(target=servers[-1].serve_forever, args=(0.05,), daemon=True).start()
    yield servers[0].server_port
    for each in servers:
        each.shutdown()
        each.server_close()


def invoke(*arguments: object) -> Result:
    """The command `omni` in this process; a bug raises through it."""
    from omni.cli.app import app

    return CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)


def succeed(*arguments: object) -> str:
    """What a command prints that succeeds."""
    result = invoke(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def refuse(*arguments: object) -> str:
    """The sentence of a command that is refused."""
    result = invoke(*arguments)
    return one_sentence(result.exit_code, result.stdout, result.stderr)


def one_sentence(status: int, stdout: str, stderr: str) -> str:
    """The sentence of a refusal, which is the only output."""
    assert status == 2, stderr
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert stderr.startswith("Error: ")
    assert stderr.endswith(".\n")
    return stderr


def randomise(model: Any, seed: int = 0) -> None:
    """Give an encoder weights among which none is zero or one, where a mistake would not show."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "norm" in name and name.endswith("weight"):
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            elif name.endswith(("cls_token", "position_embeddings")):
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * 1.5 / parameter[0].numel() ** 0.5)


def assert_same(found: Any, expected: Any, tolerance: float, what: str = "") -> None:
    """Two tensors are equal up to `tolerance` of the largest value."""
    import torch

    scale = expected.abs().max().item()
    torch.testing.assert_close(
        found, expected, rtol=tolerance, atol=tolerance * scale, msg=lambda message: f"{what}: {message}"
    )


@pytest.fixture(scope="session")
def compiles() -> bool:
    """Whether this machine has a C++ compiler, and a processor that our C++ is for."""
    import torch

    return shutil.which("c++") is not None and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GQA = {**TEXT, "num_key_value_heads": 1, "head_dim": 16}
THINKERS: dict[str, dict[str, Any]] = {
    "qwen3": GQA,
    "llama": GQA,
    "mistral": GQA,
    "gemma": GQA,
    "gemma2": {**GQA, "query_pre_attn_scalar": 16, "final_logit_softcapping": 5.0},
    "gemma3_text": {**GQA, "query_pre_attn_scalar": 16},
    "gemma3n_text": {
        **GQA,
        "layer_types": ["sliding_attention", "full_attention"],
        "laurel_rank": 4,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gemma4_text": {
        **GQA,
        "layer_types": ["sliding_attention", "full_attention"],
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
    },
    "falcon_h1": {
        **GQA,
        "mamba_d_ssm": 32,
        "mamba_n_heads": 2,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
        "lm_head_multiplier": 0.3,
    },
    "granite": {**TEXT, "logits_scaling": 3.0},
    "cohere": {**TEXT, "logit_scale": 0.25},
    "phi": TEXT,
    "opt": {
        **{key: TEXT[key] for key in TEXT if key != "intermediate_size"},
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
    },
    "gpt2": {
        "vocab_size": 64,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 2,
        "n_positions": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
SIZE = {"image_size": 16, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWERS: dict[str, dict[str, Any]] = {
    "omni_vision": {**SIZE, "intermediate_size": 32},
    "clip_vision_model": {**SIZE, "intermediate_size": 32},
    "siglip_vision_model": {**SIZE, "intermediate_size": 32},
    "dinov2": {**SIZE, "mlp_ratio": 2},
    "vit": {**SIZE, "intermediate_size": 32},
}
IMAGE = 3
"""The placeholder's id where there is no tokenizer."""


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Any]:
    """`make_config(thinker, tower, text={...}, **section)`: pictures of 16 x 16 become 2 x 2 patches and CLS, 5 tokens."""
    from omni import OmniConfig

    def make(
        thinker: str = "qwen3", tower: str = "omni_vision", text: dict[str, Any] | None = None, **section: Any
    ) -> OmniConfig:
        encoder = {"model_type": tower, **TOWERS[tower]}
        return OmniConfig(
            modalities={"image": {"encoder": encoder, "token_id": IMAGE, "projector": "mlp", **section}},
            text_config={"model_type": thinker, **THINKERS[thinker], **(text or {})},
        )

    return make


@pytest.fixture(scope="session")
def make_model(make_config: Callable[..., Any]) -> Callable[..., Any]:
    """As `make_config`, with weights large enough for every input to matter; in eval mode."""
    import torch

    from omni import OmniForConditionalGeneration

    def make(*args: Any, config: Any = None, seed: int = 0, **kwargs: Any) -> OmniForConditionalGeneration:
        torch.manual_seed(seed)
        model = OmniForConditionalGeneration(config or make_config(*args, **kwargs)).eval()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                if parameter.ndim > 1:
                    parameter.copy_(noise * 0.2)
                else:
                    parameter.add_(noise * 0.1)
        return model

    return make


HEAVY = ["torch", "transformers.generation", "transformers.modeling_utils", "transformers.processing_utils"]
HEAVY += [f"transformers.models.auto.{kind}_auto" for kind in ("modeling", "processing", "image_processing")]
multiprocessing.get_context("forkserver").set_forkserver_preload(HEAVY)
START = """
import multiprocessing, os, runpy, sys
multiprocessing.set_start_method(None, force=True)  # as in a new process
for number, name in enumerate([os.devnull, *files]):
    os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), number)
os.environ.clear()
os.environ.update(environment)
os.chdir(folder)
assert not [name for name in sys.modules if name.split(".")[0] == "omni"]
if arguments[0] == "-m":
    sys.path.insert(0, folder)
    sys.argv = arguments[1:]
    runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
elif arguments[0] == "-c":
    sys.path.insert(0, folder)
    sys.argv = ["-c", *arguments[2:]]
    exec(arguments[1], {"__name__": "__main__"})
else:
    sys.path.insert(0, os.path.dirname(arguments[0]))
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`python("-m", "omni", "ask")`: what `subprocess.run([sys.executable, "-m", "omni", "ask"])` does, but no imports.

    A process of its own in which torch and the heart of transformers are imported already, and nothing of omni. `path` is
    what `PYTHONPATH` would be. Where it matters what is imported when, or where an import reads a variable, take
    `subprocess`.
    """

    def run(*arguments: object, cwd: Path | None = None, path: Sequence[object] = ()) -> Any:
        files = [str(tmp_path_factory.mktemp("python") / name) for name in ("stdout", "stderr")]
        given = {"files": files, "folder": str(cwd or Path.cwd()), "environment": dict(os.environ)}
        given["arguments"] = words = [str(argument) for argument in arguments]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "path", [*map(str, path), *sys.path])
            process = multiprocessing.get_context("forkserver").Process(target=exec, args=(START, given))
            process.start()
        process.join(900)  # a busy machine takes long
        process.kill()
        out, err = (Path(name).read_text() if Path(name).exists() else "" for name in files)
        return subprocess.CompletedProcess(words, process.exitcode, out, err)

    return run


@pytest.fixture(scope="session")
def start_server() -> Callable[..., tuple[subprocess.Popen[str], int]]:
    """`start_server(log, path, "serve", checkpoint, **environment)`: `omni serve` on a free port, when `path` answers."""

    def start(log: Path, path: str, *arguments: str, **environment: str) -> tuple[subprocess.Popen[str], int]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "omni", *arguments, "--host", "127.0.0.1", "--port", str(port)]
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, text=True, env={**os.environ, **environment})
        until = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < until:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=240)
                return process, port
            except OSError:
                time.sleep(0.2)
        process.kill()
        pytest.fail(f"The server did not start: {log.read_text()}")

    return start


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """Byte-level BPE with `<image>` and the project's chat template."""
    from omni.training.tokenizer import train_tokenizer

    return train_tokenizer(
        ["what shape is it", "a red circle", "how many", "blue square"] * 4, 300, {"image": "<image>"}
    )


@pytest.fixture(scope="session")
def make_pair(make_config: Callable[..., Any], make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """`make_pair(**section)`: a model and its processor, whose vocabulary is the tokenizer's."""
    import copy

    from omni import OmniImageProcessor, OmniProcessor

    def make(thinker: str = "qwen3", text: dict[str, Any] | None = None, **section: Any) -> tuple[Any, Any]:
        text = {
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
            **(text or {}),
        }
        section.setdefault("token_id", tokenizer.convert_tokens_to_ids("<image>"))
        model = make_model(config=make_config(thinker, text=text, **section))
        processor = OmniProcessor(
            image_processor=OmniImageProcessor(size={"height": 16, "width": 16}),
            tokenizer=copy.deepcopy(tokenizer),
            modalities=model.config.modalities,
        )
        return model, processor

    return make

"""Choose where kernels run: the GPU when there is one, Triton's interpreter when there is none."""

import gc
import importlib.metadata
import os
import sys
import threading
from collections import Counter
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

assert "triton" not in sys.modules or "TRITON_INTERPRET" in os.environ, "too late to choose the interpreter"
# CUDA_VISIBLE_DEVICES and friends are torch's business; asking torch does not import triton
import torch  # noqa: E402

GPU = torch.cuda.is_available()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# no test may reach for the network, or for telemetry
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
with suppress(ModuleNotFoundError):  # a GPU machine may come without it
    from hypothesis import settings

    # on a machine that is shared an example may take any time; the same examples everywhere
    settings.register_profile("ours", deadline=None, derandomize=True)
    settings.load_profile("ours")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if GPU else "cpu")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data sets and models beside the repository."""
    folder = ROOT.parent / "shared"
    if not (folder / "data").is_dir():
        pytest.skip("needs the data sets of the folder `shared` beside the repository")
    return folder


@pytest.fixture(scope="session")
def stories(shared: Path) -> Path:
    """A real language model of 260 thousand parameters."""
    return shared / "models" / "stories260K"


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct from its package, converted once for all workers, and for `ual quickstart`."""
    from ual.files import cache_folder
    from ual.pipelines.quickstart import model

    try:
        importlib.metadata.distribution(model.PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"needs the package {model.PACKAGE}")
    return model.prepare(cache_folder(os.environ))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights and tied matrices, with a tokenizer of bytes: for what needs no language."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    words = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", model_max_length=512
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, initializer_range=0.2,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


# what runs mostly in others' Python, where a tracer costs as much as the test and sees nothing of ours
_UNTRACED = ("triton", "tests/invariants/", "the_real_model")
# files whose tests share what took processes or a model to make: in one worker, so that it is made once
_TOGETHER = (
    "test_launches", "test_sharded", "test_parallel", "test_transformers_serve", "test_local",
    "test_adapters", "test_report", "test_quickstart_model", "test_ahead_of_time", "test_wrapped",
    "test_gpu_training", "test_weak_to_strong", "test_clusters",
)  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of `make test` and `make proofs`."""
    parser.addoption(
        "--only", choices=["fast", "slow"], help="run the tests without the mark `slow`, or these"
    )
    parser.addoption(
        "--parts",
        type=int,
        default=1,
        help="with --only slow: run 1 / PARTS of the files; the commit selects",
    )


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    functions: set[str] = set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        # tracing costs as much again, and a further parameter seldom reaches a further line, but of a refusal
        further = function in functions and "refus" not in function
        if further or any(part in item.nodeid for part in _UNTRACED):
            item.add_marker(pytest.mark.untraced)
        functions.add(function)
        if item.path.stem in _TOGETHER:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        if not GPU and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    _select(config, items)


def _select(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what --only and --parts exclude.

    `slow(spare=n)` spares each nth case of a function: it is fast.
    """
    from tests.mutants import turn

    only, parts = config.getoption("--only"), config.getoption("--parts")
    if only is None:
        return
    slow, cases = [], Counter[str]()
    for item in items:
        function = item.nodeid.partition("[")[0]
        mark = item.get_closest_marker("slow")
        spare = mark.kwargs.get("spare") if mark else 1
        slow.append(spare is None or cases[function] % spare > 0)
        cases[function] += 1
    files = sorted({item.path for item, is_slow in zip(items, slow, strict=True) if is_slow})
    due = files[turn(parts) :: parts] if parts > 1 else files
    wanted = [is_slow == (only == "slow") for is_slow in slow]
    kept = [
        item
        for item, want in zip(items, wanted, strict=True)
        if want and (only == "fast" or item.path in due)
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in {*kept}])
    items[:] = kept


def pytest_collection_finish() -> None:
    """Exclude modules and tests from garbage collection.

    They are half a million objects, which transformers' Trainer would have searched at every start.
    """
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """No coverage of untraced tests; a debugger's tracer stays.

    pytest-cov 7's own marker has no effect in a worker of xdist: two of its collectors run there, and the
    second, once stopped, resumes the first.
    """
    if not (item.config.pluginmanager.hasplugin("_cov") and item.get_closest_marker("untraced")):
        return (yield)
    tracer, of_threads = sys.gettrace(), threading.gettrace()
    sys.settrace(None)
    threading.settrace(None)
    try:
        return (yield)
    finally:
        threading.settrace(of_threads)
        sys.settrace(tracer)

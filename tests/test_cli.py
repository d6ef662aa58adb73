"""The command line as people use it: what it prints where, what it leaves on disk, and the one line it fails with.

Happy paths are processes. Refusals run `main` in this process, its descriptors captured, because there are many.
"""

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest

from build import Shape
from reference import read_safetensors, write_safetensors

KEYS = {
    "forecast_tps",
    "text",
    "mode",
    "prompt_tokens",
    "generation_tokens",
    "prompt_tps",
    "generation_tps",
    "ttft_s",
    "peak_memory_gb",
    "peak_rss_gb",
    "bytes_per_token",
    "reads_per_token",
    "hit_rate",
    "held_share",
    "transfer_bytes_per_token",
    "tier_hit_rate",
    "pool_copies",
}
FOOTER = ["Mode: ", "Prompt: 5 tokens, ", "Generation: 12 tokens, ", "Peak memory: ", "Flash: "]
STORY = ["generate", "-p", "Once upon a time", "-m", "12"]


@dataclass
class Run:
    code: int
    out: str
    err: str


def process(*args, stdin=None, env=None, **options):
    """Run the command as a process; what it says on stderr is never a traceback or a warning."""
    done = subprocess.run(
        [sys.executable, "-m", "mlxflash", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | (env or {}),
        **options,
    )
    assert "Traceback" not in done.stderr
    assert "Warning" not in done.stderr
    return Run(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def command(capfd, monkeypatch, tmp_path):
    """Run the command in this process, its cache in a folder of its own."""
    from mlxflash.cli import main

    monkeypatch.setenv("MLXFLASH_CACHE", str(tmp_path / "cache"))

    def call(*args):
        capfd.readouterr()
        code = 0
        try:
            main([str(a) for a in args])
        except SystemExit as end:
            code = end.code
        return Run(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="module")
def bundle(library):
    """A tiny bundle that streams within 2.5 MB."""
    return library.bundle(Shape(ffn=2048))


@pytest.fixture
def copy(tmp_path):
    """A directory's copy to change."""
    return lambda path: shutil.copytree(path, tmp_path / "copy")


def refused(run, *words):
    """One sentence that says `words`, exit code 1, nothing on stdout."""
    assert run.code == 1
    assert run.out == ""
    assert run.err.startswith("mlxflash: ")
    assert run.err.count("\n") == 1
    assert len(run.err) > 20
    for word in words:
        assert str(word) in run.err


def generate(model, *args):
    return "generate", "--model", model, "-p", "It was", "-m", "4", *args


def test_generate_streams_the_story_and_says_how_it_went():
    run = process(*STORY)
    assert run.code == 0
    assert len(run.out.strip()) > 20
    assert [line[: len(start)] for line, start in zip(run.err.splitlines(), FOOTER, strict=True)] == FOOTER


def test_json_from_stdin_within_a_budget_equals_the_text():
    small = ("--memory", "22MB")
    run = process("generate", "--prompt", "-", "-m", "12", "--json", *small, stdin="Once upon a time")
    assert (run.code, run.err) == (0, "")
    said = json.loads(run.out)
    assert set(said) == KEYS
    assert said["text"] == process(*STORY, *small).out.removesuffix("\n")
    assert said["mode"].startswith("approximate (high: perplexity +0.0")
    assert (said["prompt_tokens"], said["generation_tokens"]) == (5, 12)
    assert said["bytes_per_token"] > 1e5
    assert 0 < said["hit_rate"] < 1
    assert 0 < said["held_share"] < 1
    assert 0.01 < said["peak_rss_gb"] < 1
    assert min(said["prompt_tps"], said["generation_tps"], said["ttft_s"], said["reads_per_token"]) > 0


def test_text_appears_while_it_is_generated():
    args = [sys.executable, "-m", "mlxflash", "generate", "-p", "Once upon a time", "-m", "400"]
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout.read(5)
        assert run.poll() is None
        run.stdout.close()  # as `mlxflash generate | head -c 5` does
        assert run.stderr.read() == b""
    assert run.returncode == 1


def test_an_interrupt_ends_quietly():
    args = [sys.executable, "-m", "mlxflash", "generate", "-p", "Once upon a time", "-m", "400"]
    args += ["--memory", "26MB", "--exact"]  # which takes its time
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # not so where tests run in the background
    with subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heard) as run:
        assert run.stdout.read(5)
        run.send_signal(signal.SIGINT)
        assert run.communicate()[1] == b"\n"
    assert run.returncode == 130


def test_every_way_to_compute_exactly_gives_one_text(command):
    runs = [
        command(*STORY, *more)
        for more in (
            [],
            ["--exact", "--memory", "24MB"],
            ["--predictor", "oracle", "--memory", "24MB"],
            ["--exact", "--memory", "22MB", "--device", "mlx-cpu"],
            ["--exact", "--memory", "22MB", "--check-reads"],
        )
    ]
    assert {run.code for run in runs} == {0}
    assert len({run.out for run in runs}) == 1
    assert [run.err.splitlines()[0] for run in runs] == [
        "Mode: exact (all resident)",
        "Mode: exact (streaming)",
        "Mode: exact (oracle)",
        "Mode: exact (streaming)",
        "Mode: exact (streaming)",
    ]


def test_verbose_prints_the_plan(command):
    run = command(*STORY, "--memory", "22MB", "--window", "3", "-v")
    assert run.code == 0
    lines = run.err.splitlines()
    assert lines[0] == "plan for 22.0 MB:"
    assert [line.split("  ")[1] for line in lines[1:10]][-1] == "pools"
    assert lines[-len(FOOTER)].startswith("Mode: approximate")


def test_a_seed_decides_the_samples(command):
    one, two, other = (command(*STORY, "--temp", "1", "--top-k", "50", "--seed", seed).out for seed in (3, 3, 4))
    assert one == two
    assert one != other


def test_a_checkpoint_is_converted_once(command, library, tmp_path):
    first = command(*generate(library.checkpoint()))
    assert first.code == 0
    assert first.err.startswith("converting ")
    (bundle,) = (tmp_path / "cache").glob("*.flash")
    made = (bundle / "manifest.json").stat().st_mtime_ns, bundle.stat().st_ino
    second = command(*generate(library.checkpoint()))
    assert second.code == 0
    assert second.out == first.out
    assert second.err.startswith("Mode: ")
    assert ((bundle / "manifest.json").stat().st_mtime_ns, bundle.stat().st_ino) == made
    assert command(*generate(library.checkpoint(), "--dtype", "float16")).code == 0
    assert len(list((tmp_path / "cache").glob("*.flash"))) == 2


def test_convert_info_verify_and_calibrate_work_together(command, library, tmp_path):
    bundle = tmp_path / "made.flash"
    run = command("convert", library.checkpoint(), bundle, "-q", "8", "--group-size", "32", "--calibrate", "none")
    assert run.code == 0
    assert run.out.startswith(f"{bundle}: opt from ")
    assert "not measured" in run.out
    assert run.err.startswith(f"{bundle}: made in ")

    run = command("verify", bundle)
    assert (run.code, run.err) == (0, "")
    assert run.out == f"{bundle}: all 512 records match their checksums\n"

    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20, encoding="utf-8")
    run = command("calibrate", bundle, "--text", text, "--tokens", "64")
    assert (run.code, run.err) == (0, "")
    assert "recall " in run.out

    said = json.loads(command("info", bundle, "--json").out)
    assert (said["layers"], said["units_per_layer"], said["d_model"]) == (2, 256, 64)
    assert said["quantization"]["bits"] == 8
    assert said["calibration"]["low-bit"]["tokens"] > 16
    assert f"mlxflash: {bundle}" not in command("info", bundle).out


def test_a_trained_predictor_generates(command, library, tmp_path):
    bundle, text = tmp_path / "made.flash", tmp_path / "text.txt"
    assert command("convert", library.checkpoint(), bundle, "--calibrate", "none").code == 0
    text.write_text("It was the best of times, it was the worst of times. " * 400, encoding="utf-8")
    refused(command("train", bundle, "--text", "nowhere.txt"), "nowhere.txt")
    run = command("train", bundle, "--text", text, "--tokens", "600")
    assert run.code == 0
    assert run.err.startswith(f"{bundle}: trained in ")
    assert "predictor   low-rank, " in run.out
    memory = ("--memory", "4.9MB", "--max-kv-size", "128")
    run = command(*generate(bundle, "--predictor", "low-rank", *memory, "--json"))
    assert json.loads(run.out)["mode"].startswith("approximate (high")
    run = command("calibrate", bundle, "--text", text, "--predictor", "low-rank")
    assert run.out.count("recall ") == 1


def test_a_bound_makes_an_exact_run_sparse(command, library, tmp_path):
    bundle, text = tmp_path / "made.flash", tmp_path / "text.txt"
    assert command("convert", library.checkpoint(), bundle, "--calibrate", "none").code == 0
    text.write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    run = command("calibrate", bundle, "--text", text, "--predictor", "bound")
    assert "predictor   bound, " in run.out
    memory = ("--memory", "4.8MB", "--max-kv-size", "128", "--exact", "--json")
    sparse, streamed = (
        json.loads(command(*generate(bundle, *memory, "--predictor", name)).out) for name in ("bound", "all")
    )
    assert (sparse["mode"], streamed["mode"]) == ("exact (bound)", "exact (streaming)")
    assert sparse["text"] == streamed["text"]
    assert 0 < sparse["bytes_per_token"] < 0.2 * 2 * 256 * 512  # of all units


def test_info_answers_without_mlx():
    code = (
        "import sys; from mlxflash.cli import main; main(['info', 'story']); main(['verify', 'story']);"
        "main(['models']);"
        "print([m for m in ('mlx', 'mlx_lm', 'transformers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.stderr == ""
    assert run.stdout.endswith("[]\n")


def test_the_embedded_model_has_one_name_everywhere(command, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. " * 20, encoding="utf-8")
    for verb in ("info", "verify"):
        assert command(verb, "story").code == 0
    small = ("--text", text, "--tokens", "32")
    assert "high" in command("eval", "story", *small, "--memory", "24MB", "--context", "32").out
    run = command("reorder", "story", tmp_path / "ordered.flash", *small)
    assert "fewer" in run.out
    assert command("verify", tmp_path / "ordered.flash").code == 0
    for verb in ("calibrate", "train"):
        refused(command(verb, "story", *small), "story: the embedded model stays as it is", f"{verb} the copy")


@pytest.mark.parametrize("name", ["opt-125m", "some-org/some-model"])
def test_a_name_that_needs_the_network_is_one_sentence_without_it(name, tmp_path):
    """After what a public model would take and do here."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "MLXFLASH_CACHE": str(tmp_path / "cache")}
    run = process("generate", "--model", name, "-p", "x", env=offline)
    *before, last = run.err.splitlines(keepends=True)
    refused(Run(run.code, run.out, last), name, "not on this machine")
    assert bool(before) == (name == "opt-125m")
    if before:
        assert before[0].startswith("facebook/opt-125m: ")
        assert "-q 4 " in before[2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate"], ["--prompt"]),
        (["fly"], ["fly"]),
        ([], ["required"]),
        ([*STORY, "--model", "no/such/place"], ["no/such/place", "no such directory"]),
        ([*STORY, "--model", "storey"], ["storey", "alias"]),
        ([*STORY, "--memory", "lots"], ["lots", "2GB"]),
        ([*STORY, "--memory", "0"], ["'0'", "nothing"]),
        ([*STORY, "--memory", "-1"], ["-1"]),
        ([*STORY, "--memory=-1"], ["-1"]),
        ([*STORY, "--memory", "0%"], ["0%"]),
        ([*STORY, "--window", "0"], ["window 0"]),
        ([*STORY, "--predictor", "crystal"], ["crystal", "low-bit"]),
        ([*STORY, "-q", "4"], ["is a bundle already"]),
        ([*STORY, "--exact", "--predictor", "low-bit"], ["--exact", "low-bit"]),
        ([*STORY, "--device", "tpu"], ["tpu", "mlx-cpu"]),
        (["generate", "-p", ""], ["prompt is empty"]),
        (["generate", "-p", " \n"], ["prompt is empty"]),
        (["generate", "-p", "word " * 600], ["tokens", "positions end at 512"]),
        ([*STORY, "-m", "0"], ["--max-tokens 0"]),
        ([*STORY, "-m", "many"], ["many"]),
        ([*STORY, "--temp", "-1"], ["--temp"]),
        ([*STORY, "--temp", "nan"], ["--temp"]),
        ([*STORY, "--top-p", "2"], ["--top-p"]),
        ([*STORY, "--max-kv-size", "2"], ["--max-kv-size 2"]),
        ([*STORY, "--system-prompt", "Be brief."], ["chat template"]),
        ([*STORY, "--seed", "-1"], ["--seed"]),
        ([*STORY, "--seed", str(1 << 70)], ["--seed"]),
        (["info", "nowhere"], ["nowhere", "not a bundle"]),
        (["verify", "nowhere"], ["nowhere", "not a bundle"]),
        (["calibrate", "nowhere"], ["nowhere", "not a bundle"]),
        (["train", "nowhere", "--text", "x"], ["nowhere", "not a bundle"]),
        (["train", "nowhere"], ["--text", "--import"]),
        (["train", "nowhere", "--text", "x", "--import", "y"], ["--text", "--import"]),
        ([*STORY, "--exact", "--predictor", "low-rank"], ["--exact", "low-rank", "contradict"]),
        (["train", "nowhere", "--text", "x", "--tokens", "0"], ["--tokens 0"]),
        ([*STORY, "--predictor", "low-rank"], ["no low-rank predictor", "mlxflash train"]),
        (["convert", "nowhere", "x"], ["nowhere", "no such directory"]),
    ],
)
def test_a_wrong_option_is_refused(command, args, words):
    refused(command(*args), *words)


@pytest.mark.parametrize("context", [8, 40, 77, 120, 250])
def test_the_smallest_budget_named_works(command, bundle, context):
    args = (*generate(bundle, "--max-kv-size", context), "--memory")
    run = command(*args, "1kB")
    refused(run, "1.0 kB cannot work", "smallest")
    smallest = run.err.split("smallest that would is ")[1].split(" (")[0]
    assert command(*args, smallest).code == 0
    value, unit = smallest.split()
    refused(command(*args, f"{float(value) - 0.1:.1f}{unit}"), smallest)


def test_a_prompt_must_fit_the_positions_and_generation_ends_there(command):
    run = command("generate", "-p", "the " * 500, "-m", "100", "--json")
    said = json.loads(run.out)
    assert said["prompt_tokens"] + said["generation_tokens"] <= 513
    refused(command("generate", "-p", "the " * 513), "positions end at 512")


def edit_config(path, **changes):
    config = json.loads((path / "config.json").read_text()) | changes
    (path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def edit_weights(path, change):
    weights = read_safetensors(path / "model.safetensors")
    change(weights)
    write_safetensors(path / "model.safetensors", weights, "float32")


FC1 = "model.decoder.layers.1.fc1.weight"
Q = "model.decoder.layers.0.self_attn.q_proj.weight"

CHECKPOINT_DAMAGE = {
    "empty": (lambda p: [f.unlink() for f in p.iterdir()], ["config.json is missing"]),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), ["holds no weights"]),
    "other family": (lambda p: edit_config(p, model_type="mamba"), ["model_type 'mamba'", "opt"]),
    "no family": (lambda p: edit_config(p, model_type=None), ["model_type None"]),
    "odd family": (lambda p: edit_config(p, model_type=["opt"]), ["model_type ['opt']"]),
    "activation": (lambda p: edit_config(p, activation_function="swish"), ["activation_function 'swish'", "relu"]),
    "not JSON": (lambda p: (p / "config.json").write_text("{"), ["config.json: not JSON"]),
    "not an object": (lambda p: (p / "config.json").write_text("[1]"), ["config.json is not a JSON object"]),
    "not text": (lambda p: (p / "config.json").write_bytes(b"\xff\xfe\x00"), ["config.json: not JSON"]),
    "no width": (lambda p: edit_config(p, hidden_size=None), ["hidden_size"]),
    "no positions": (lambda p: edit_config(p, max_position_embeddings=None), ["max_position_embeddings"]),
    "width as text": (lambda p: edit_config(p, hidden_size="64"), ["hidden_size"]),
    "no heads": (lambda p: edit_config(p, num_attention_heads=0), ["num_attention_heads"]),
    "heads": (lambda p: edit_config(p, num_attention_heads=5), ["num_attention_heads"]),
    "no layers": (lambda p: edit_config(p, num_hidden_layers=0), ["num_hidden_layers"]),
    "negative width": (lambda p: edit_config(p, ffn_dim=-4), ["ffn_dim"]),
    "quantised": (lambda p: edit_config(p, quantization={"bits": 4}), ["already quantised"]),
    "missing tensor": (lambda p: edit_weights(p, lambda w: w.pop(FC1)), ["layers.1.mlp.fc1.weight", "missing"]),
    "misshapen": (
        lambda p: edit_weights(p, lambda w: w.update({FC1: w[FC1][:, :-1]})),
        ["layers.1.mlp.fc1.weight", "[256, 63]", "[256, 64]"],
    ),
    "extra tensor": (lambda p: edit_weights(p, lambda w: w.update(extra=w[FC1])), ["'extra'", "no place"]),
    "NaN in a FFN": (lambda p: edit_weights(p, lambda w: w[FC1].__setitem__((3, 5), np.nan)), [FC1, "NaN"]),
    "infinity": (lambda p: edit_weights(p, lambda w: w[Q].__setitem__((3, 5), np.inf)), [Q, "NaN or infinity"]),
    "truncated": (lambda p: os.truncate(p / "model.safetensors", 50_000), ["model.safetensors", "not a readable"]),
    "no header": (lambda p: os.truncate(p / "model.safetensors", 5), ["model.safetensors", "not a readable"]),
    "a directory": (
        lambda p: [(p / "model.safetensors").unlink(), (p / "model.safetensors").mkdir()],
        ["model.safetensors"],
    ),
}


@pytest.mark.parametrize("name", CHECKPOINT_DAMAGE)
def test_a_damaged_checkpoint_is_refused_and_leaves_no_bundle(command, copy, library, tmp_path, name):
    damage, words = CHECKPOINT_DAMAGE[name]
    checkpoint = copy(library.checkpoint())
    damage(checkpoint)
    refused(command("convert", checkpoint, tmp_path / "made.flash"), *words)
    assert not (tmp_path / "made.flash").exists()
    run = command(*generate(checkpoint))
    assert run.code == 1
    assert run.out == ""
    assert len(run.err.splitlines()) <= 2  # that it converts, and why it could not
    assert words[0] in run.err
    assert not list((tmp_path / "cache").glob("*.flash"))


def test_a_target_that_exists_is_left_alone(command, library, tmp_path):
    target = tmp_path / "taken"
    target.write_text("mine")
    refused(command("convert", library.checkpoint(), target), "already exists")
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-q", "3"], ["3 bits", "8 and 4"]),
        (["-q", "4", "--group-size", "48"], ["48"]),
        (["-q", "4", "--group-size", "0"], ["group"]),
        (["-q", "4", "--group-size", "-64"], ["group"]),
        (["-q", "4", "--group-size", "16"], ["group"]),
        (["-q", "4", "--dtype", "float64"], ["float64"]),
        (["--tokens", "0"], ["--tokens 0"]),
        (["--calibrate", "nowhere.txt"], ["nowhere.txt"]),
    ],
)
def test_wrong_conversion_options_are_refused(command, library, tmp_path, options, words):
    refused(command("convert", library.checkpoint(), tmp_path / "made.flash", *options), *words)
    assert not (tmp_path / "made.flash").exists()


def test_a_target_in_a_place_that_cannot_be_is_refused(command, library, tmp_path):
    (tmp_path / "file").write_text("")
    refused(command("convert", library.checkpoint(), tmp_path / "file" / "made"), tmp_path / "file")
    assert command("convert", library.checkpoint(), tmp_path / "new" / "folder" / "made").code == 0


@pytest.mark.parametrize("limit", [30_000, 100_000])  # within the first layer file; within the resident weights
def test_a_full_disk_is_one_sentence_and_the_next_try_goes_on(command, library, tmp_path, limit):
    def full():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    shape = Shape(ffn=64, vocab=900)
    target = tmp_path / "made.flash"
    run = process("convert", library.checkpoint(shape), target, preexec_fn=full)
    refused(run, target, "large")
    assert not target.exists()
    assert (tmp_path / "made.flash.partial").is_dir()
    assert command("convert", library.checkpoint(shape), target).code == 0
    assert not (tmp_path / "made.flash.partial").exists()
    assert command("verify", target).code == 0


BUNDLE_DAMAGE = {
    "truncated layer": (lambda p: os.truncate(p / "layers/001.bundle", 30_000), ["001.bundle", "30000 bytes"]),
    "layer is a directory": (
        lambda p: [(p / "layers/001.bundle").unlink(), (p / "layers/001.bundle").mkdir()],
        ["001.bundle"],
    ),
    "manifest": (lambda p: (p / "manifest.json").write_text("[]"), ["manifest.json"]),
    "no config": (lambda p: (p / "config.json").unlink(), ["config.json: missing"]),
    "bad config": (lambda p: (p / "config.json").write_text("{}"), ["model_type None"]),
    "config lacks a key": (lambda p: edit_config(p, hidden_size=None), ["hidden_size"]),
    "config lacks heads": (lambda p: edit_config(p, num_attention_heads=None), ["num_attention_heads"]),
    "no tokenizer": (lambda p: [f.unlink() for f in p.glob("tokenizer*")], ["tokenizer", "convert again"]),
    "bad tokenizer": (lambda p: (p / "tokenizer.json").write_text("{}"), ["tokenizer", "convert again"]),
    "resident weights": (lambda p: os.truncate(next(p.glob("resident*")), 1000), ["resident-00000.safetensors"]),
    "predictor": (lambda p: os.truncate(p / "predictors/low-bit/001.safetensors", 1000), ["001.safetensors"]),
}


@pytest.mark.parametrize("name", BUNDLE_DAMAGE)
def test_a_damaged_bundle_is_refused(command, copy, bundle, name):
    damage, words = BUNDLE_DAMAGE[name]
    bundle = copy(bundle)
    damage(bundle)
    refused(command(*generate(bundle, "--memory", "4.5MB")), *words)


@pytest.fixture
def flipped(copy, bundle):
    """A bundle with one bit of one record of the second layer flipped, and its file, record and byte."""
    bundle = copy(bundle)
    manifest = json.loads((bundle / "manifest.json").read_text())
    file, record = bundle / "layers/001.bundle", 77
    at = 16384 + record * manifest["record"]["stride"]
    data = bytearray(file.read_bytes())
    data[at + 10] ^= 4
    file.write_bytes(data)
    return bundle, file, record, at


def test_verify_names_the_damaged_record(command, flipped):
    bundle, file, record, _ = flipped
    run = command("verify", bundle)
    assert (run.code, run.out) == (1, "")
    assert run.err.splitlines() == [
        f"{file}: record {record} does not match its checksum",
        f"mlxflash: {bundle}: 1 records are damaged; convert again",
    ]


def test_check_reads_stops_at_the_damaged_record(command, flipped):
    bundle, file, record, at = flipped
    for memory in ([], ["--memory", "4.5MB"]):
        run = command(*generate(bundle, "-p", "It was the best of times", "--check-reads", *memory))
        refused(run, file, f"record {record}", f"offset {at}")


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", ["too short"]), (b"It was.", ["too short"]), (b"\xff\xfe" * 200, ["not UTF-8"]), (None, ["Is a directory"])],
)
def test_a_text_that_cannot_be_measured_on_is_refused(command, copy, library, tmp_path, content, words):
    bundle = copy(library.bundle())
    before = {f: f.read_bytes() for f in bundle.rglob("*") if f.is_file()}
    if content is None:
        (tmp_path / "text").mkdir()
    else:
        (tmp_path / "text").write_bytes(content)
    refused(command("calibrate", bundle, "--text", tmp_path / "text"), *words)
    refused(command("train", bundle, "--text", tmp_path / "text"), *words)
    assert {f: f.read_bytes() for f in bundle.rglob("*") if f.is_file()} == before


def test_a_chat_template_is_applied_unless_told_otherwise(command, copy, library):
    bundle = copy(library.bundle())
    config = json.loads((bundle / "tokenizer_config.json").read_text())
    config["chat_template"] = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %} assistant:"
    (bundle / "tokenizer_config.json").write_text(json.dumps(config))
    count = {
        name: json.loads(command(*generate(bundle, "--json", *more)).out)["prompt_tokens"]
        for name, more in (
            ("chat", []),
            ("plain", ["--ignore-chat-template"]),
            ("system", ["--system-prompt", "Be brief."]),
        )
    }
    assert count["plain"] < count["chat"] < count["system"]


def test_a_model_without_a_predictor_says_so(command, library, tmp_path):
    bundle = tmp_path / "made"
    odd = Shape(d_model=48, ffn=2048)
    assert command("convert", library.checkpoint(odd), bundle).code == 0
    assert command(*generate(bundle, "--memory", "4.5MB")).err.startswith("Mode: exact (streaming)\n")
    refused(command(*generate(bundle, "--predictor", "low-bit")), "no low-bit predictor")
    refused(command("calibrate", bundle), "no low-bit predictor")

"""The command line: what each command prints and writes, and how it refuses."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import yaml
from command_line import expected_answer, refusal, refusal_in_one_line
from processors import make_image, train_tokenizer
from tiny_pair import picture_row, save_pair, tiny_target
from transformers import TrainingArguments

from dream_hf import CombinedDrafter, DreamConfig, DreamDrafter
from dream_hf.cli import main
from dream_hf.cli.main import COMMANDS
from dream_hf.cli.train_parser import TrainParser
from dream_hf.load_models import load_models
from dream_hf.training.arguments import DreamTrainingArguments
from dream_hf.training.run import ModelDataArguments


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return save_pair(tmp_path_factory.mktemp("pair"), tree_depth=3, tree_size=8)


@pytest.fixture
def picture(tmp_path):
    make_image(color="blue").save(tmp_path / "blue.png")
    return str(tmp_path / "blue.png")


def models(folders):
    return ["--target", str(folders[0]), "--drafter", str(folders[1]), "--device", "cpu"]


# -- help -------------------------------------------------------------------------------------------------------------


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom dream_hf.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'PIL', 'datasets') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"
    assert all(name in output for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "example:" in text and f"dream-hf {command}" in text


def test_help_of_train_shows_ours_first_and_theirs_on_demand(capsys):
    texts = {}
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            main(["train", option])
        assert stop.value.code == 0
        texts[option] = capsys.readouterr().out
    short, whole = texts["--help"], texts["--help-all"]
    options = re.findall(r"^  (--\w+)", short, re.MULTILINE)
    assert options[:3] == ["--target", "--train_dataset", "--eval_dataset"]
    ours = [each.name for dtype in (ModelDataArguments, DreamTrainingArguments) for each in dataclasses.fields(dtype)]
    theirs = {each.name for each in dataclasses.fields(TrainingArguments)}
    own = [f"--{name}" for name in ours if name not in theirs]
    assert options[: len(own)] == own
    assert len(short.splitlines()) < 200 and "--optim_args" not in short and "--help-all" in short
    everything = re.findall(r"^  (--\w+)", whole, re.MULTILINE)
    assert sorted(everything) == sorted({f"--{each}" for each in ours if each in make_options()})
    assert everything[: len(options)] == options


def make_options():
    return TrainParser(description="", epilog="").options


@pytest.mark.parametrize("command", COMMANDS)
def test_unknown_and_shortened_options_are_refused_in_one_line_with_the_commands_own_help(command, capsys):
    needed = {
        "generate": ["--target", "x", "--prompt", "x"], "bench": ["--target", "x"], "convert": ["a", "b"],
        "push": ["a", "b"], "attach": ["a", "b", "c"], "info": ["a"], "export": ["a", "b", "--target", "x"],
        "merge": ["a", "b"],
        "probe": ["a", "--target", "x"], "serve": ["--target", "x", "--drafter", "x"],
        "regenerate": ["--target", "x", "--rows", "x", "--output", "x"],
        "train": ["--target", "x", "--train_dataset", "x", "--output_dir", "x"],
    }.get(command, [])  # fmt: skip
    shortened = {
        "train": "--train_data",
        "demo": "--max-new",
        "push": "--ye",
        "convert": "--targ",
        "attach": "--cop",
        "merge": "--bas",
    }.get(command, "--devic")
    for unknown in (["--banana"], [shortened, "x"], ["--banana=3"]):
        message = refusal_in_one_line(capsys, command, *needed, *unknown)
        assert f"unrecognized arguments: {' '.join(unknown)}; `dream-hf {command} --help` shows" in message
    with pytest.raises(SystemExit):
        main(["--banana"])
    assert (
        capsys.readouterr().err
        == "dream-hf: error: unrecognized arguments: --banana; `dream-hf --help` shows the options\n"
    )


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


# -- loading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "auto"])
def test_load_models_puts_both_on_one_device_in_one_dtype(folders, device):
    if device == "auto" and torch.accelerator.is_available():
        pytest.skip("would be spread over accelerators")
    loaded = load_models(str(folders[0]), str(folders[1]), dtype="bfloat16", device=device)
    for model in (loaded.target, loaded.drafter):
        assert {(weight.device.type, weight.dtype) for weight in model.parameters()} == {("cpu", torch.bfloat16)}
        assert not model.training


# -- generate ---------------------------------------------------------------------------------------------------------


def test_generate_with_several_pictures(folders, picture, capsys):
    arguments = ["--image", picture, "--image", picture, "--prompt", "hello", "--max-new-tokens", "8", "--json"]
    answer = expected_answer("hello", [make_image(color="blue")] * 2, 8)
    assert main(["generate", *models(folders), *arguments]) == 0
    drafted = json.loads(capsys.readouterr().out)
    assert main(["generate", "--target", str(folders[0]), "--device", "cpu", *arguments]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert drafted["text"] == plain["text"] == answer
    assert sum(drafted["accepted_lengths"]) == drafted["num_tokens"] - 1
    assert plain["tau"] is None and plain["accepted_lengths"] is None


def test_drafters_without_training_by_name(folders, picture, capsys):
    arguments = ["--image", picture, "--prompt", "hello", "--max-new-tokens", "8", "--device", "cpu", "--json"]
    answer = expected_answer("hello", [make_image(color="blue")], 8)
    for drafter in ("retrieval", "skip", f"model:{folders[0]}", f"retrieval+skip+{folders[1]}"):
        assert main(["generate", "--target", str(folders[0]), "--drafter", drafter, *arguments]) == 0
        said = json.loads(capsys.readouterr().out)
        assert said["text"] == answer and said["tau"] >= 1.0
        drafted = load_models(str(folders[0]), drafter, device="cpu").drafter
        assert isinstance(drafted, CombinedDrafter) == ("+" in drafter)
    assert len(drafted.drafters) == 3 and isinstance(drafted.drafters[-1], DreamDrafter)
    refused = refusal(capsys, "generate", "--target", str(folders[0]), "--drafter", "retrieval+nowhere/x", *arguments)
    assert "nowhere/x" in refused


def test_generate_for_a_text_only_target(tmp_path, capsys):
    import transformers

    tokenizer = train_tokenizer([], chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}A:")
    config = tiny_target().config.text_config
    target = transformers.LlamaForCausalLM(config)
    target.save_pretrained(tmp_path / "target")
    tokenizer.save_pretrained(tmp_path / "target")
    DreamDrafter.for_target(target, tree_depth=2, tree_size=4).save_pretrained(tmp_path / "drafter")
    names = ["--target", str(tmp_path / "target"), "--device", "cpu", "--prompt", "hello", "--json"]
    texts = []
    for drafter in ([], ["--drafter", str(tmp_path / "drafter")]):
        assert main(["generate", *names, *drafter, "--max-new-tokens", "8"]) == 0
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != ""
    assert "pass the target's processor" in refusal(capsys, "generate", *names, "--image", str(_picture(tmp_path)))


def _picture(folder):
    make_image().save(folder / "one.png")
    return folder / "one.png"


def test_generate_streams(folders, capsys):
    assert main(["generate", *models(folders), "--prompt", "hello", "--max-new-tokens", "8"]) == 0
    output = capsys.readouterr().out
    assert output.startswith(expected_answer("hello", [], 8)[:5])
    assert "tokens/s" in output and "bonus included" in output


def test_generate_samples_with_a_seed(folders, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        sampling = ["--temperature", "1.5", "--top-p", "0.95", "--seed", seed]
        assert (
            main(["generate", *models(folders), "--prompt", "x", "--max-new-tokens", "12", "--json", *sampling]) == 0
        )
        texts.append(json.loads(capsys.readouterr().out)["text"])
    assert texts[0] == texts[1] != texts[2]


def test_generate_refuses(folders, tmp_path, capsys):
    assert "`--temperature` (-1.0)" in refusal(
        capsys, "generate", *models(folders), "--prompt", "x", "--temperature", "-1"
    )
    other = DreamDrafter.for_target(tiny_target(), intermediate_size=8)
    other.config.target = {**other.config.target, "num_hidden_layers": 7}
    other.save_pretrained(tmp_path / "other")
    arguments = ["--target", str(folders[0]), "--drafter", str(tmp_path / "other"), "--device", "cpu"]
    assert "trained for another target" in refusal(capsys, "generate", *arguments, "--prompt", "x")
    missing = refusal(capsys, "generate", "--target", str(tmp_path / "nothing"), "--prompt", "x")
    assert str(tmp_path / "nothing") in missing


# -- the others -------------------------------------------------------------------------------------------------------


def test_bench(folders, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"messages": [{"role": "user", "content": q}]}) + "\n" for q in ("x", "hello")))
    arguments = ["--tasks", str(rows), "--num-prompts", "2", "--temperatures", "0", "--max-new-tokens", "6"]
    arguments += ["--methods", "plain", "dream_tree", "--trees", "2/2/3", "--warmup", "1", "--no-plots"]
    assert (
        main(["bench", *models(folders), *arguments, "--output", str(tmp_path / "out"), "--date", "2026-01-02"]) == 0
    )
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [row["method"] for row in results["rows"]] == ["plain", "dream_tree", "dream_tree 2/2/3"]
    assert results["provenance"]["date"] == "2026-01-02"
    assert "| rows | dream_tree |" in capsys.readouterr().out


def test_bench_of_drafters_of_other_kinds(folders, tmp_path):
    target, drafter = (str(folder) for folder in folders[:2])
    arguments = [
        "--tasks",
        "scene",
        "--num-prompts",
        "1",
        "--temperatures",
        "0",
        "--max-new-tokens",
        "4",
        "--warmup",
        "1",
    ]
    arguments += ["--no-plots", "--also", f"both=retrieval+{drafter}", "--methods", "plain", "--output", str(tmp_path)]
    assert main(["bench", "--target", target, "--drafter", "retrieval", *arguments]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["plain", "retrieval_tree", "both"]


def test_bench_refuses_in_one_line_before_anything_is_loaded(tmp_path, capsys):
    bench = ["bench", "--target", str(tmp_path / "never-looked-at"), "--output", str(tmp_path / "out")]
    assert "`--methods` has ['dream_tre']; there are ['plain'," in refusal_in_one_line(
        capsys, *bench, "--methods", "plain", "dream_tre"
    )
    assert "`task` ('poem') is unknown" in refusal_in_one_line(capsys, *bench, "--tasks", "poem")
    missing = str(tmp_path / "prompts.jsonl")
    assert f"`task` ({missing!r}) does not exist" in refusal_in_one_line(capsys, *bench, "--tasks", missing)
    assert "no tree shape" in refusal_in_one_line(capsys, *bench, "--trees", "6-4-32")
    assert "0 is below 1" in refusal_in_one_line(capsys, *bench, "--repeats", "0")
    assert "`temperatures` ([-1.0])" in refusal_in_one_line(capsys, *bench, "--temperatures", "-1")
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder" in refusal_in_one_line(capsys, *bench, "--output", str(tmp_path / "file"))
    for name, content, message in (
        ("empty.jsonl", "", "has no usable row among its 0"),
        ("cut.jsonl", '{"messages": [{"role"', "row 0 cannot be used"),
        ("columns.jsonl", '{"a": 1}', "the row has ['a']"),
        ("number.jsonl", "3", "row 0 cannot be used"),
        ("cut.json", '[{"messages"', "cannot be read: Expecting"),
    ):
        (tmp_path / name).write_text(content)
        refused = refusal(capsys, *bench, "--tasks", str(tmp_path / name))
        assert "`task` (" in refused and name.split(".")[0] in refused and message in refused


def test_bench_refuses(folders, tmp_path, capsys):
    asked = ["--target", str(folders[0]), "--methods", "dream_tree", "--num-prompts", "1"]
    assert "`drafter` is needed" in refusal(capsys, "bench", *asked, "--output", str(tmp_path / "out"))


def test_bench_in_batches_with_repeats(folders, tmp_path, capsys):
    arguments = [
        "--tasks",
        "scene",
        "--num-prompts",
        "3",
        "--temperatures",
        "0",
        "--max-new-tokens",
        "6",
        "--no-plots",
    ]
    arguments += ["--batch-size", "2", "--repeats", "2", "--warmup", "1", "--output", str(tmp_path)]
    assert main(["bench", *models(folders), *arguments]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["provenance"]["batch_size"], results["provenance"]["repeats"]) == (2, 2)
    assert list(results["failed_methods"]) == ["prompt_lookup"]  # transformers takes one prompt at a time there
    methods = ["plain", "plain_static", "dream_chain", "dream_tree"]
    assert [(row["method"], row["num_prompts"], row["match_rate"]) for row in results["rows"]] == [
        (method, 3, 1.0) for method in methods
    ]
    table = capsys.readouterr().out
    assert "Batch size 2, medians of 2 runs, at most 6 tokens" in table
    assert "worst batch" in table and "worst prompt" not in table


def test_regenerate(folders, tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}) + "\n")
    arguments = ["--rows", str(tmp_path / "rows.jsonl"), "--output", str(tmp_path / "out.jsonl")]
    assert main(["regenerate", *models(folders), *arguments, "--max-new-tokens", "8"]) == 0
    assert "1 rows, 1 cut at the length limit" in capsys.readouterr().out
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["messages"][1]["content"][0]["text"] == expected_answer("hello", [], 8)
    assert "does not exist" in refusal(capsys, "regenerate", *models(folders), "--rows", "none.jsonl", *arguments[2:])


def test_push_without_yes_contacts_nobody(folders, capsys):
    assert main(["push", str(folders[1]), "owner/name"]) == 0
    output = capsys.readouterr().out
    assert "model.safetensors" in output and "--yes" in output
    assert "is no folder" in refusal(capsys, "push", "nowhere", "owner/name")


@pytest.mark.parametrize("offline", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_push_without_a_connection_says_so_in_one_line(folders, offline):
    command = [sys.executable, "-m", "dream_hf", "push", str(folders[1]), "owner/name", "--yes"]
    environment = {**os.environ, "HF_TOKEN": "none", **offline}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(
        "dream-hf push: error: Could not upload to 'owner/name': the Hub could not be reached."
    )


def test_push_to_a_name_that_is_none(folders, capsys):
    assert "'a/b/c': it is no Hub id" in refusal_in_one_line(capsys, "push", str(folders[1]), "a/b/c", "--yes")


def test_convert_refuses_what_is_none(folders, tmp_path, capsys):
    assert "is a drafter already" in refusal(capsys, "convert", str(folders[1]), str(tmp_path / "out"))


# -- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(folders, tmp_path):
    with (tmp_path / "rows.jsonl").open("w") as file:
        for question in ("x", "hello", "over again"):
            row = {**picture_row(question), "images": ["picture.png"]}
            file.write(json.dumps(row) + "\n")
    make_image().save(tmp_path / "picture.png")
    values = {
        "target": str(folders[0]),
        "train_dataset": str(tmp_path / "rows.jsonl"),
        "eval_dataset": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "max_steps": 2,
        "warmup_steps": 0,
        "report_to": "none",
        "use_cpu": True,
        "license": "apache-2.0",
        "drafter_config": {"tree_depth": 2},
    }
    text = "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()) + "learning_rate: 3e-3\n"
    (tmp_path / "recipe.yaml").write_text(text)
    return tmp_path / "recipe.yaml"


def test_train_from_a_recipe_with_flags_on_top(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "--max_steps", "1", "--output_dir", str(tmp_path / "second")]) == 0
    drafter = DreamDrafter.from_pretrained(tmp_path / "second")
    assert drafter.config.tree_depth == 2
    written = yaml.safe_load((tmp_path / "second" / "recipe.yaml").read_text())
    asked = {"max_steps": 1, "learning_rate": 0.003, "license": "apache-2.0", "drafter_config": {"tree_depth": 2}}
    assert asked.items() <= written.items()
    assert set(written) - set(asked) <= {
        "target", "train_dataset", "eval_dataset", "output_dir", "warmup_steps", "report_to", "use_cpu",
        "dataloader_pin_memory",
    }  # fmt: skip
    assert "eval_tau" in json.loads((tmp_path / "second" / "eval_results.json").read_text())
    again = tmp_path / "second" / "recipe.yaml"
    assert main(["train", "--config", str(again), "--output_dir", str(tmp_path / "third")]) == 0
    state = DreamDrafter.from_pretrained(tmp_path / "third").state_dict()
    assert all(torch.equal(value, state[name]) for name, value in drafter.state_dict().items())


def test_train_adapters(recipe, folders, tmp_path):
    from peft import PeftModel

    recipe.write_text("".join(line for line in recipe.open() if not line.startswith("drafter_config")))
    assert main(["train", str(recipe), "--drafter", str(folders[1]), "--use_lora", "--lora_r", "2"]) == 0
    drafter = DreamDrafter.from_pretrained(folders[1])
    before = {name: value.clone() for name, value in drafter.state_dict().items()}
    merged = PeftModel.from_pretrained(drafter, tmp_path / "out").merge_and_unload().state_dict()
    assert any(not torch.equal(value, merged[name]) for name, value in before.items())


def test_train_refuses(recipe, tmp_path, capsys):
    missing = refusal_in_one_line(capsys, "train", "--train_dataset", "x")
    assert "the following arguments are required: --target; `dream-hf train --help` shows" in missing
    assert "invalid int value: 'many'" in refusal_in_one_line(capsys, "train", str(recipe), "--max_steps", "many")
    assert "unrecognized arguments: second.yaml" in refusal_in_one_line(capsys, "train", str(recipe), "second.yaml")
    recipe.write_text(recipe.read_text() + "lerning_rate: 1\n")
    assert "lerning_rate" in refusal(capsys, "train", str(recipe))
    recipe.write_text("help: true\n")
    assert "['help']" in refusal(capsys, "train", str(recipe))
    recipe.write_text("max_steps: many\n")
    assert "`max_steps` ('many')" in refusal(capsys, "train", str(recipe))
    recipe.write_text("- a list\n")
    assert "must map names of options to values" in refusal(capsys, "train", str(recipe))
    recipe.write_text("a: [\n")
    assert "is no YAML" in refusal(capsys, "train", str(recipe))
    assert "cannot be read" in refusal(capsys, "train", str(tmp_path / "none.yaml"))
    flags = ["--target", "x", "--train_dataset", "y", "--output_dir", str(tmp_path / "out")]
    assert "`use_lora` (True)" in refusal(capsys, "train", *flags, "--use_lora")
    assert "is no JSON" in refusal(capsys, "train", *flags, "--drafter_config", "{")


def test_probe_tells_how_well_a_drafter_foretells_its_target(capsys):
    options = ["demo", "--target", "demo", "--num-tokens", "12"]
    assert main(["probe", *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    [trial] = found["trials"]
    assert found["best"] == {} and min(trial["shares"]) > 0.6 and trial["num_tokens"][0] >= 11
    assert main(["probe", *options, "--task", "chart"]) == 0 and "tokens/step" in capsys.readouterr().out


def test_info_tells_what_a_drafter_is(folders, capsys, tmp_path):
    target, drafter = map(str, folders)
    assert main(["info", drafter, "--json"]) == 0
    alone = json.loads(capsys.readouterr().out)
    config = DreamConfig.from_pretrained(drafter)
    assert alone["kind"] == "DreamDrafter" and alone["settings"]["tree_depth"] == config.tree_depth
    assert alone["weights"] == sum(weight.numel() for weight in DreamDrafter.from_pretrained(drafter).parameters())
    assert main(["info", drafter, "--target", target, "--json"]) == 0
    together = json.loads(capsys.readouterr().out)
    assert together["fits"] == "yes" and together["weights_read_in_plain_steps"] > 1
    assert {name: together[name] for name in ("kind", "weights", "settings")} == {
        name: alone[name] for name in ("kind", "weights", "settings")
    }
    assert main(["info", drafter, "--target", "demo"]) == 0
    assert "fits" in (shown := capsys.readouterr().out) and "no: " in shown
    assert main(["info", "retrieval", "--target", target]) == 0 and "RetrievalDrafter" in capsys.readouterr().out
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert "name its target with --target" in refusal(capsys, "info", str(tmp_path))

"""Launch files: accelerate reads them, knows every key, and makes of them the sharding they are named after."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "launch").glob("*.yaml"))
OPTIONS = {action.dest for action in launch_command_parser()._actions}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_accelerate_knows_every_option(path):
    config = load_config_from_file(str(path))  # raises at keys it does not know
    settings = yaml.safe_load(path.read_text())
    assert settings["num_processes"] % settings["num_machines"] == 0
    for part in ("deepspeed_config", "fsdp_config", "parallelism_config"):
        assert set(settings.get(part, {})) <= OPTIONS, "accelerate launch has no such flag"
        for value in settings.get(part, {}).values():
            assert not isinstance(value, str) or value in ("none", "standard", "TRANSFORMER_BASED_WRAP")
    assert config.mixed_precision == "no", "sharded training refuses anything else"
    kind = str(config.distributed_type).rpartition(".")[2]
    if "zero" in path.stem:
        assert kind == "DEEPSPEED" and config.deepspeed_config["zero_stage"] == int(path.stem[-1])
    if path.stem == "sequence":
        assert config.num_processes % config.parallelism_config["parallelism_config_sp_size"] == 0
    if path.stem in ("fsdp2", "multinode"):
        assert kind == "FSDP" and config.fsdp_config["fsdp_version"] == 2


def test_a_typo_would_be_found(tmp_path):
    text = (ROOT / "launch/zero3.yaml").read_text()
    (tmp_path / "typo.yaml").write_text(text.replace("num_machines", "num_machine"))
    with pytest.raises(ValueError, match="num_machine"):
        load_config_from_file(str(tmp_path / "typo.yaml"))
    assert "zero_stages" not in OPTIONS


def test_the_readme_names_every_file_and_no_other():
    readme = (ROOT / "launch/README.md").read_text()
    names = {p.name for p in FILES} | {"slurm.sh"}
    assert all(f"`{name}`" in readme for name in names)
    assert set(re.findall(r"`(\w+\.(?:yaml|sh))`", readme)) == names


def test_the_slurm_script_passes_only_options_that_accelerate_has():
    script = ROOT / "launch/slurm.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    text = "\n".join(line for line in script.read_text().splitlines() if not line.startswith("#"))
    launch = text[text.index("accelerate launch") :]
    flags = set(re.findall(r"--(\w+)", launch)) - {"resume"}
    assert len(flags) == 6 and flags <= OPTIONS
    header = re.findall(r"^#SBATCH (--[\w-]+(?:=\S+)?)", script.read_text(), re.M)
    assert {"--requeue", "--signal=B:TERM@120"} <= set(header)

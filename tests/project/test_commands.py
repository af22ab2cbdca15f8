"""The shell commands of the README and of the documentation's pages run, in a folder with what they name.

Each page has a new folder, in which its commands run in order. Commands that need a GPU, the network or an
installation are checked as far as that goes without one.
"""

import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from argparse import ArgumentParser
from contextlib import ExitStack, closing
from functools import partial
from importlib.metadata import metadata
from itertools import chain, pairwise
from pathlib import Path

import pytest
import timm
import typer
from command import succeed
from packaging.requirements import Requirement
from pages import ROOT, TEXTS, blocks, commands, inline_commands
from suite_folders import image, vtab_folder

from vapt_fast import AdaptiveViT
from vapt_fast.cli import app
from vapt_fast.demo.placed_digits import write_canvases

BACKBONE = "vit_digits_patch4_32"

# What a page's commands need besides the extra "demo".
NEEDED = {
    "benchmarks.md": ["joblib"],
    "command_line.md": ["joblib", "peft_import", "peft"],  # the first so that peft finds no folder kernels
    "export.md": ["onnxruntime", "onnxscript"],
}
QUICK = ("CONTRIBUTING.md", "README.md", "installation.md", "serving.md")
PAGES = [name for name, text in TEXTS.items() if any(language == "sh" for language, _ in blocks(text))]
WITH_PYTHON = ("benchmarks.md",)  # whose Python writes what a command reads
LANGUAGES = {"python", "sh", "text", "diff", "json", "bibtex"}  # besides Sphinx's, as {eval-rst}

# ---- what the commands find: a user's files


def write_picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    image(1, 0).save(path)


def write_pictures(folder):
    write_picture(folder / "a.jpg")
    write_picture(folder / "b.jpg")


def write_classes(folder):
    for label, name in enumerate(("cat", "dog")):
        for index in range(6):
            (folder / name).mkdir(parents=True, exist_ok=True)
            image(label, index).save(folder / name / f"{index}.png")


def write_suite(folder):
    for task in ("cifar", "svhn"):
        vtab_folder(folder, task)


def write_adapter(folder):
    model = AdaptiveViT(BACKBONE, pretrained=True, num_classes=2, num_prompts=2)
    model.save_adapter(folder, class_names=["cat", "dog"])


def write_script(path):
    path.write_text((Path(__file__).parents[1] / "tools" / "timm_script.py").read_text())


FILES = {
    "DATA": write_suite,
    "DATA/train": lambda folder: [write_picture(folder / f"{label:03}" / "a.jpg") for label in range(100)],
    "folder": write_classes,
    "more/pictures": write_pictures,
    "out": write_adapter,
    "out/adapter_config.json": lambda path: write_adapter(path.parent),
    "out/birds": write_adapter,
    "out/cars": write_adapter,
    "path/to/image/folder": write_classes,
    "path/to/images": write_classes,
    "path/to/labelled/images": write_classes,
    "photos": partial(write_canvases, counts={"train": 6, "val": 2, "test": 2}),
    "picture.jpg": write_picture,
    "pictures": write_pictures,
    "query.jpg": write_picture,
    "token": lambda path: path.write_text("secret"),
    "train.py": write_script,
    "validate.py": write_script,
}


def write_files(words):
    """Write what the words of a command name, unless it is there or the command is to write it."""
    for before, word in pairwise(["", *words]):
        path = Path(re.split("[=@]", word)[-1])
        if before != "--output" and str(path) in FILES and not path.exists():
            FILES[str(path)](path)


# ---- what there is instead of downloads and GPUs, and less of everything

STAND_INS = {
    r"^vit_base_\S+$": BACKBONE,
    r"^vapt_vit_base_\S+$": "vapt_test_vit",
    r"hf-hub:me/cars$": "out/cars",
    r"^cuda(:\d)?$": "cpu",
    r"^ray$": "joblib",  # a cluster
    r"^vtab$": "vtab:svhn",
    r"^512$": "64",  # --image-size
}

# By words of a command, options that it gets unless it has them.
SHORTENED = {
    ("vapt-fast", "train"): {"--epochs": 1},
    ("vapt-fast", "train", "vtab:cifar"): {"--other-sizes": None},
    ("vapt-fast", "sweep", "--data"): {
        **{"--backbone": BACKBONE, "--epochs": 1, "--lr": 1, "--weight-decay": 0, "--seed": 1},
        "--other-sizes": None,
    },
    ("vapt-fast", "bench"): {"--batch-size": 2, "--rounds": 2, "--no-memory": None},
    ("vapt-fast", "demo"): {"--seeds": 1, "--processes": 1},
}


def with_stand_ins(words):
    """Return the words of a command that runs here."""
    for word in words:
        if re.match("(vapt_)?vit_base_", word):
            assert timm.is_model_pretrained(word), f"timm has no weights for {word}"
    replaced = [word for word in words if word != "..."]
    for pattern, stand_in in STAND_INS.items():
        replaced = [re.sub(pattern, stand_in, word) for word in replaced]
    for needed, options in SHORTENED.items():
        if set(needed) <= set(words):
            added = [pair for pair in options.items() if pair[0] not in words]
            replaced += [str(word) for word in chain(*added) if word is not None]
    return replaced


# ---- what runs them, or checks those that can't run


class Shell:
    """Runs the commands of a page in the current folder; ``programs`` has those it knows."""

    def __init__(self, monkeypatch, resources):
        self.monkeypatch, self.resources = monkeypatch, resources
        self.served = self.address = None
        self.programs = {
            **{"vapt-fast": self.vapt_fast, "python": self.python, "torchrun": self.torchrun},
            **{"pip": check_pip, "make": check_make, "curl": self.curl, ".": check_activation},
            "pre-commit": self.pre_commit,
        }
        module = importlib.import_module("vapt_fast.cli.demo")
        tiny = {
            "methods": ("vapt", "full"),
            "epochs": {5: 1, 10: 1},
            "base_lrs": (1,),
            "full_base_lrs": (0.01,),
        }
        monkeypatch.setattr(module, "Experiment", partial(module.Experiment, **tiny))
        module = importlib.import_module("vapt_fast.cli.serve")
        monkeypatch.setattr(module, "start", self.start)
        for name in ("check_installed", "stop", "_check_port", "_check_served", "_wait"):
            monkeypatch.setattr(module, name, lambda *_: None)

    def run(self, words):
        while re.match(r"[A-Z_]+=", words[0]):  # an environment variable
            words = words[1:]
        program, *arguments = with_stand_ins(words)
        assert program in self.programs, f"nothing here runs {program}"
        write_files(arguments)
        self.programs[program](arguments)
        for option, path in pairwise(arguments):
            assert option != "--output" or Path(path).exists(), f"nothing was written to {path}"

    def vapt_fast(self, arguments):
        succeed(*arguments)

    def torchrun(self, arguments):
        """Run two processes, without GPUs."""
        arguments[arguments.index("--nproc-per-node") + 1] = "2"
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        execute([*launcher, *arguments], env=environment)

    def python(self, arguments):
        script, *rest = arguments
        if script == "bench/omniglot.py":
            self.omniglot(rest)
        else:
            execute([sys.executable, script, *rest])

    def omniglot(self, arguments):
        """Parse the arguments; the comparison needs downloads, and takes hours."""
        path = ROOT / "bench" / "omniglot.py"
        self.monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        self.monkeypatch.syspath_prepend(path.parent)  # as Python does for a script
        module = importlib.import_module("omniglot")
        calls = []
        self.monkeypatch.setattr(module, "compare", lambda *given: calls.append(given))
        module.main()
        assert len(calls) == 1

    def start(self, options, **_):
        """Take note of what would be served."""
        self.served = options

    def curl(self, arguments):
        """Send the request to one replica, without the engine."""
        if shutil.which("curl") is None:
            pytest.skip("there is no curl")
        if self.address is None:
            self.serve()
        arguments = [os.path.expandvars(word).replace("localhost:8000", self.address) for word in arguments]
        execute(["curl", "--silent", "--show-error", "--fail", "--noproxy", "*", *arguments])

    def serve(self):
        for package in ("starlette", "python_multipart", "uvicorn"):
            pytest.importorskip(package)
        import uvicorn

        from vapt_fast.serving.engine import make_stack
        from vapt_fast.serving.http import make_app
        from vapt_fast.serving.service import Service

        with closing(socket.create_server(("127.0.0.1", 0))) as probe:
            port = probe.getsockname()[1]
        self.address = f"127.0.0.1:{port}"
        self.monkeypatch.setenv("TOKEN", Path("token").read_text())
        service = Service(self.served, make_stack(self.served))
        application = make_app(lambda: service, "replica-1", None)
        server = uvicorn.Server(uvicorn.Config(application, port=port, log_level="error"))
        thread = threading.Thread(target=server.run)
        thread.start()
        self.resources.callback(thread.join)
        self.resources.callback(setattr, server, "should_exit", True)
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)

    def pre_commit(self, arguments):
        """Install the hooks into another repository."""
        pytest.importorskip("pre_commit")
        environment = os.environ | {"GIT_CONFIG_GLOBAL": os.devnull}
        execute(["git", "init", "--quiet", "."], env=environment)
        execute([sys.executable, "-m", "pre_commit", *arguments], env=environment)
        execute([sys.executable, "-m", "pre_commit", "validate-config", ROOT / ".pre-commit-config.yaml"])


def execute(command, **options):
    """Run a program that must succeed, and return what it printed."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def check_pip(arguments):
    """Check that what is to be installed, with its extras, is there."""
    parser = ArgumentParser(allow_abbrev=False)
    parser.add_argument("command", choices=["install"])
    parser.add_argument("requirements", nargs="*")
    for option in ("--index-url", "--no-build-isolation", "-e"):
        parser.add_argument(option, **({} if option == "--index-url" else {"action": "store_true"}))
    for text in parser.parse_intermixed_args(arguments).requirements:
        requirement = Requirement(re.sub(r"^\.", "vapt_fast", text))
        extras = metadata(requirement.name).get_all("Provides-Extra") or []
        assert requirement.extras <= set(extras), f"{text}: the extras are {extras}"


def check_make(arguments):
    """Check that make would do something, and return what."""
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    command = ["make", "--dry-run", "--always-make", *arguments]
    planned = execute(command, cwd=ROOT, env=os.environ | {"LC_ALL": "C"})
    assert "Nothing to be done" not in planned
    return planned


def check_activation(arguments):
    """Check that make makes the environment that is to be activated."""
    (script,) = arguments
    assert f"-m venv {Path(script).parents[1]}\n" in check_make(["test"])


@pytest.mark.skipif(sys.platform == "win32", reason="the commands are those of a Unix shell")
@pytest.mark.parametrize(
    "page", [page if page in QUICK else pytest.param(page, marks=pytest.mark.full) for page in PAGES]
)
def test_commands_run(page, tmp_path, monkeypatch):
    for package in ("sklearn", "matplotlib", *NEEDED.get(page, ())):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    with ExitStack() as resources:
        shell = Shell(monkeypatch, resources)
        for language, content in blocks(TEXTS[page]):
            if language == "python" and page in WITH_PYTHON:
                exec(content, {})
            elif language == "sh":
                for words in commands(content):
                    shell.run(words)


def test_no_command_is_overlooked():
    """Every block names its language: commands in one that doesn't would be left out."""
    found = {(page, language) for page, text in TEXTS.items() for language, _ in blocks(text)}
    assert {each for each in found if not each[1].startswith("{") and each[1] not in LANGUAGES} == set()


# ---- commands within sentences


def check_options(arguments):
    """Check that the command line has the command and its options."""
    group = typer.main.get_command(app)
    name = next((word for word in arguments[:1] if word.islower() and word[0] != "-"), None)
    command = group if name is None else group.commands[name]
    known = {"--help"}.union(*([*option.opts, *option.secondary_opts] for option in command.params))
    assert {word for word in arguments if word.startswith("--")} <= known


def check_torchrun(arguments):
    assert arguments[arguments.index("-m") + 1] == "vapt_fast"
    check_options(arguments[arguments.index("-m") + 2 :])


def check_script(arguments):
    assert (ROOT / arguments[0]).is_file()


INLINE = {
    **{"vapt-fast": check_options, "torchrun": check_torchrun, "python": check_script},
    **{"pip": check_pip, "make": check_make},
}


@pytest.mark.parametrize(
    "command",
    sorted({command for text in TEXTS.values() for command in inline_commands(text, tuple(INLINE))}),
)
def test_commands_within_sentences_exist(command):
    program, *arguments = shlex.split(command)
    INLINE[program](arguments)

"""The claims of docs/security.md that source code can prove: no string becomes code, and no pickle is trusted."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
#: Names that make code of strings, or of bytes.
FORBIDDEN = {
    *("eval", "exec", "compile", "__import__"),
    *("os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "asyncio.create_subprocess_shell"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "shelve.open", "joblib.load", "dill.loads"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all"),
}
#: Who starts other programs, each from a list of arguments.
STARTS_PROGRAMS = {
    "jakiro_vllm/cli.py",
    "jakiro_vllm/server.py",
    "jakiro_vllm/training/answers.py",
    "kernels/native/__init__.py",
}
STARTERS = ("subprocess.run", "subprocess.Popen", "subprocess.call", "subprocess.check_call", "subprocess.check_output")
EXECS = ("os.exec", "os.spawn", "os.posix_spawn")


def sources() -> list[Path]:
    return sorted([*(ROOT / "jakiro_vllm").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def keyword(call: ast.Call, name: str) -> object:
    """The constant that a call gives to a keyword; None where it gives none."""
    found = [k.value for k in call.keywords if k.arg == name]
    return found[0].value if found and isinstance(found[0], ast.Constant) else None


def dangers(source: str) -> list[str]:
    """Calls that could run what a user or a file says."""
    found = []
    for call in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)):
        name = ast.unparse(call.func)
        if name in FORBIDDEN:
            found.append(name)
        if keyword(call, "shell") or any(
            k.arg == "shell" and not isinstance(k.value, ast.Constant) for k in call.keywords
        ):
            found.append(f"{name} with a shell")
        if name == "torch.load" and keyword(call, "weights_only") is not True:
            found.append("torch.load of pickled objects")
        if name in ("np.load", "numpy.load") and keyword(call, "allow_pickle") is not False:
            found.append("numpy.load of pickled objects")
        if name in STARTERS and call.args and isinstance(call.args[0], ast.Constant | ast.JoinedStr):
            found.append(f"{name} of a string")
        if any(k.arg == "trust_remote_code" for k in call.keywords):
            found.append("trust_remote_code, which is the user's to give to vLLM")
    return found


def starts_programs(source: str) -> bool:
    names = [ast.unparse(n.func) for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call)]
    return any(name in STARTERS or name.startswith(EXECS) for name in names)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_a_user_or_a_file_says(path: Path) -> None:
    assert dangers(path.read_text()) == []


def test_few_modules_start_programs() -> None:
    found = {str(path.relative_to(ROOT)) for path in sources() if starts_programs(path.read_text())}
    assert found == STARTS_PROGRAMS


@pytest.mark.parametrize(
    "source",
    [
        "eval(text)",
        "import os\nos.system(text)",
        "subprocess.run(command, shell=True)",
        "subprocess.run(command, shell=wanted)",
        "subprocess.run(f'ls {name}')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=wanted)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "pickle.loads(data)",
        "yaml.load(text, Loader=loader)",
        "AutoConfig.from_pretrained(name, trust_remote_code=True)",
    ],
)
def test_the_scanner_sees_dangers(source: str) -> None:
    """Negative control."""
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "subprocess.run([program, name], check=True)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.eval()",
        "re.compile(text)",
    ],
)
def test_the_scanner_lets_the_rest_pass(source: str) -> None:
    assert dangers(source) == []

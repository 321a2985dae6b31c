"""How large the house is: lines, files and what a reader must hold in the head, of `src/`.

python -m benchmarks.count [FOLDER]
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src"
MANY = 7
_OPEN_DICT = re.compile(r"[dD]ict\[str, Any\]")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def main() -> None:
    """Print the counts, the long signatures, and the rooms."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SOURCE
    texts = {file: file.read_text(encoding="utf-8") for file in sorted(folder.rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    long = [(file, name, count) for file, tree in trees.items() for name, count in _signatures(tree) if count >= MANY]
    print(f"lines                                {sum(len(text.splitlines()) for text in texts.values())}")
    print(f"files                                {len(texts)}")
    print(f"dataclasses                          {sum(map(_dataclasses, trees.values()))}")
    print(f"signatures of {MANY} arguments or more     {len(long)}")
    print(f"dict[str, Any] in signatures         {sum(map(_open_dicts, trees.values()))}")
    for file, name, count in long:
        print(f"  {count} arguments: {file.relative_to(folder)}: {name}")
    rooms: dict[str, list[int]] = {}
    for file, text in texts.items():
        parts = file.relative_to(folder).parts
        rooms.setdefault("/".join(parts[:2]) if len(parts) > 2 else parts[0], []).append(len(text.splitlines()))
    for room, lines in rooms.items():
        print(f"  {len(lines):3} files {sum(lines):6} lines  {room}")


def _functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def _arguments(function: Function) -> list[ast.arg]:
    given = function.args
    return [argument for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs) if argument.arg not in _BOUND]


_BOUND = ("self", "cls")


def _signatures(tree: ast.AST) -> Iterator[tuple[str, int]]:
    return ((function.name, len(_arguments(function))) for function in _functions(tree))


def _dataclasses(tree: ast.AST) -> int:
    classes = (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    return sum(any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list) for node in classes)


def _open_dicts(tree: ast.AST) -> int:
    found = 0
    for function in _functions(tree):
        notes = [argument.annotation for argument in _arguments(function)] + [function.returns]
        found += sum(len(_OPEN_DICT.findall(ast.unparse(note))) for note in notes if note is not None)
    return found


if __name__ == "__main__":
    main()

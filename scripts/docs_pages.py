"""Pages of the documentation site that are made from the code, and files of the repository that pages link to.

`mkdocs build --strict` runs this script (mkdocs.yml). Links out of `docs/` work in the repository; for the site the
files to which they lead are copied below `files/`.
"""

import argparse
import io
import re
from contextlib import redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path

import mkdocs_gen_files

from subquad import cli
from subquad.mixers.options import OPTIONS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"(\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")

ADDITIVE = r"S_t = S_{t-1} + k_t v_t^\top"
READ = r"o_t = \tfrac{1}{\sqrt K}\, S_t^\top q_t"
DELTA = r"S_t = \tilde S_t + \beta_t\, k_t (v_t - \tilde S_t^\top k_t)^\top"
EQUATIONS = {
    "linear_attention": [ADDITIVE, READ, r"q_t, k_t \leftarrow \phi(q_t), \phi(k_t)"],
    "retnet": [r"S_t = \gamma_h S_{t-1} + k_t v_t^\top", READ, r"\gamma_h = 1 - 2^{-5-h}"],
    "mamba2": [
        r"S_t = e^{g_t} S_{t-1} + k_t v_t^\top",
        r"o_t = \tfrac{1}{\sqrt K}\, S_t^\top q_t + D\, v_t",
        r"g_t = -\operatorname{softplus}(a_t)",
    ],
    "gla": [
        r"S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top",
        READ,
        r"g_t = \tfrac{1}{16} \log \sigma(W_2 W_1 x_t + b)",
    ],
    "metala": [
        r"k_t = 1 - e^{g_t}",
        r"S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1} + k_t v_t^\top",
        r"o_t = \tfrac{1}{\sqrt K}\, S_t^\top q_t + \big(q_t^\top (w \odot k_t)\big)\, v_t",
    ],
    "deltanet": [r"\tilde S_t = S_{t-1}", DELTA, READ, r"\beta_t = \sigma(w^\top x_t + b)"],
    "gated_deltanet": [
        r"\tilde S_t = e^{g_t} S_{t-1}",
        DELTA,
        READ,
        r"g_t = -e^{A} \operatorname{softplus}(a_t + \delta)",
    ],
    "xlstm": [
        r"S_t = f_t S_{t-1} + i_t\, k_t v_t^\top \qquad n_t = f_t n_{t-1} + i_t\, k_t",
        r"o_t = \frac{S_t^\top q_t / \sqrt K}{\max(|n_t^\top q_t| / \sqrt K,\; 1)}",
        r"f_t = \sigma(\cdot) \qquad i_t = \exp(\cdot)",
    ],
    "kda": [
        r"\tilde S_t = \operatorname{Diag}(e^{g_t})\, S_{t-1}",
        DELTA,
        READ,
        r"g_t = -e^{A} \operatorname{softplus}(W_2 W_1 x_t + \delta)",
    ],
    "hgrn2": [
        r"f_t = l + (1 - l)\, \sigma(W x_t + b) \qquad k_t = 1 - f_t",
        r"S_t = \operatorname{Diag}(f_t)\, S_{t-1} + k_t v_t^\top",
        READ,
    ],
}
"""Per state; S [K, V], q, k and g [K], v [V]."""


def write(page: str, text: str) -> None:
    with mkdocs_gen_files.open(page, "w") as file:
        file.write(text)


def write_mixers() -> None:
    for name, options in OPTIONS.items():
        if name not in EQUATIONS:
            continue
        rows = " \\\\\n".join(f"& {line}" for line in EQUATIONS[name])
        defaults = "\n".join(f"| `{key}` | `{value}` |" for key, value in asdict(options()).items())
        write(
            f"mixer/{name}.md",
            f"# {name}\n\n{options.source}\n\nPer state, S of K rows (channels of a key) and V columns:\n\n"
            f"\\[\n\\begin{{aligned}}\n{rows}\n\\end{{aligned}}\n\\]\n\n"
            f'```python\nstudent = subquad.linearize(teacher, mixer="{name}")\n```\n\n'
            f"| option | default |\n|---|---|\n{defaults}\n\n"
            f"::: subquad.mixers.options.{options.__name__}\n    options: {{heading_level: 2}}\n\n"
            f"::: subquad.mixers.{name}\n    options: {{heading_level: 2, inherited_members: false}}\n",
        )


API = {
    "The student": [
        "subquad.linearize",
        "subquad.load_teacher",
        "subquad.modeling.modeling_subquad.SubquadForCausalLM",
    ],
    "Training": ["subquad.distill.pipeline.DistillationRun", "subquad.config.load_recipe"],
    "Export": ["subquad.export.export", "subquad.export.convert"],
    "Extensions": [
        "subquad.register_mixer",
        "subquad.register_stage",
        "subquad.register_export_target",
        "subquad.register_suite",
        "subquad.mixers.base.Mixer",
    ],
}


def write_reference() -> None:
    parts = [f"## {title}\n\n" + "\n".join(f"::: {name}\n" for name in names) for title, names in API.items()]
    write("reference/api.md", "# Python\n\n" + "\n".join(parts) + "\nThe operators: [ops](../ops.md).\n")
    schema = "::: subquad.config.schema\n    options: {show_root_heading: false, inherited_members: false}\n"
    write("reference/recipe.md", f"# Recipe keys\n\nExplained in [distillation](../distillation.md).\n\n{schema}")
    write("reference/cli.md", f"# Commands\n\n{commands(cli.build_parser())}")


def commands(parser: argparse.ArgumentParser) -> str:
    """The help of each command."""
    (subparsers,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    parts = []
    for name, command in subparsers.choices.items():
        with redirect_stdout(io.StringIO()) as out:
            command.print_help()
        parts.append(f"## {name}\n\n```text\n{out.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


def copy_linked_files() -> None:
    """Rewrites links that leave `docs/`, and copies what they lead to, with what that links to."""
    waiting, done = [(path, path.relative_to(DOCS)) for path in sorted(DOCS.rglob("*.md"))], set()
    while waiting:
        source, page = waiting.pop()
        changed = LINK.sub(partial(relinked, source=source, page=page, waiting=waiting, done=done), source.read_text())
        if changed != source.read_text() or DOCS not in source.parents:
            write(str(page), changed)


def relinked(match: re.Match, source: Path, page: Path, waiting: list, done: set) -> str:
    target = (source.parent / match[2]).resolve()
    if DOCS in target.parents and DOCS in source.parents:
        return match[0]
    if DOCS in target.parents:
        new = target.relative_to(DOCS)
    elif target.is_file() and ROOT in target.parents:
        new = Path("files") / target.relative_to(ROOT)
        if target not in done:
            done.add(target)
            if target.suffix == ".md":
                waiting.append((target, new))
            else:
                with mkdocs_gen_files.open(str(new), "wb") as file:
                    file.write(target.read_bytes())
    else:
        return match[0]
    return f"{match[1]}{'../' * (len(page.parts) - 1)}{new.as_posix()}{match[3]}"


write_mixers()
write_reference()
copy_linked_files()

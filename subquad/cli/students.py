"""Commands on one model: linearize, mixers, inspect, generate, export."""

import json
from argparse import Namespace
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subquad.cli.parser import Parser, count, named, placement_of
from subquad.registry import EXPORT_TARGETS, MIXERS
from subquad.utils import UserError, as_user_error, probe_output, quiet_libraries

if TYPE_CHECKING:
    from subquad.modeling.budget import Allocation
    from subquad.modeling.placement import Placement

CALIBRATION_SHAPE = 8, 256
"""Rows and tokens of each row that `linearize --calibrate` reads without a budget."""

CONTROL = "The control: the teacher's own attention; with copy_qkv false its projections are random."


def add_commands(parser: Parser) -> None:
    create = parser.command("linearize", run_linearize, "Replace attention with mixers and save the untrained student.")
    create.option("teacher", "TEACHER", "nano, smollm2-135m, a directory, a .gguf file or a hub id")
    create.option("--output -o", "DIR", "new directory", type=Path, required=True)
    create.option(
        "--mixer", "NAME", "mixer of every layer, see `subquad mixers` (default: gated_deltanet)", words=MIXERS
    )
    create.option("--option", "NAME=VALUE", "option of the mixer", action="append", default=[])
    create.option(
        "--keep", "LAYERS", "layers that keep their attention, counted from 0, as in 9,19,29 or 0-3 (default: none)"
    )
    types = "mixers and options by layer, where --mixer and --keep do not suffice, as in '{default: gla, 0-3: mamba2}'"
    create.option("--layer-types", "YAML", types)
    create.flag("--no-copy", "initialize the q, k, v and o projections at random")
    budget = "attention with a window for each key/value head: bytes of N tokens of the teacher's cache, or as in 4MB"
    create.option("--budget", "N", budget)
    create.option(
        "--budget-memory",
        "MIXER",
        "with --budget: a mixer that remembers what has left some heads' windows",
        words=MIXERS,
    )
    create.option("--budget-context", "T", "with --budget: heads may keep all tokens, at the price of T", type=count)
    keep = "key/value groups that keep all tokens, besides a budget or windows"
    create.option("--keep-groups", "N", keep, type=count)
    criteria = ["retrieval", "kl", "halo"]
    ranking = "ranking of groups: retrieval, kl or halo, see `subquad select`"
    create.option("--keep-by", "NAME", ranking, choices=criteria, default="retrieval")
    calibration = "text source for calibration, the errors of windows or the ranking of groups (default: none)"
    create.option("--calibrate", "SOURCE", calibration)
    create.option("--seed", "N", "seed of random initializations", type=int, default=0)
    create.option(
        "--export", "TARGET", f"restrict the student to layers of {', '.join(EXPORT_TARGETS)}", words=EXPORT_TARGETS
    )
    create.placement()
    create.quiet()
    listed = parser.command("mixers", run_mixers, "List the mixers with their papers and options.")
    listed.flag("--json", "print them as JSON")
    inspect = parser.command("inspect", run_inspect, "Print a student's layers, options, parameters and cache size.")
    inspect.option("directory", "DIR", "saved student")
    inspect.flag("--json", "print them as JSON, a mixer and its options for each layer")
    generate = parser.command("generate", run_generate, "Continue a text with a model.")
    generate.option("model", "MODEL", "a student, or nano, smollm2-135m, a directory, a .gguf file or a hub id")
    generate.option("text", "TEXT", "text to continue")
    generate.option("--tokens", "N", "maximum number of new tokens", type=count, default=64)
    generate.option("--temperature", "T", "sampling temperature; 0: greedy decoding", type=float, default=0.0)
    generate.option("--seed", "N", "seed of sampling", type=int, default=0)
    generate.option(
        "--draft", "MODEL", "a faster model, such as its student, that proposes tokens; the text is the same"
    )
    generate.option("--draft-tokens", "N", "tokens that it proposes at a time", type=count, default=5)
    generate.flag("--chat", "format TEXT as a user message with the chat template")
    generate.placement()
    export = parser.command("export", run_export, "Convert a student for transformers, vLLM, llama.cpp or MLX.")
    export.option("directory", "DIR", "saved student")
    formats = f"gguf, which writes a file; a directory: mlx, onnx, or a target ({', '.join(EXPORT_TARGETS)})"
    export.option("--format", "FORMAT", formats, required=True, words=["gguf", "mlx", "onnx", *EXPORT_TARGETS])
    export.option("--output -o", "OUT", "new directory or file", required=True)
    export.option(
        "--type",
        "TYPE",
        "number format of a GGUF file: f32, f16, q8_0 or q4_k (default: f16)",
        words=["f32", "f16", "q8_0", "q4_k"],
    )


def run_linearize(args: Namespace) -> None:
    from subquad.config import Data
    from subquad.mixers import find_options
    from subquad.modeling.export_target import find_target
    from subquad.modeling.layer_types import keep_groups_mistake

    if args.budget is None:
        for name, value in {"--budget-context": args.budget_context, "--budget-memory": args.budget_memory}.items():
            if value is not None:
                raise UserError(f"{name}: got {value} without --budget, expected both")
        types = read_layer_types(args)
        if args.keep_groups is not None and (mistake := keep_groups_mistake(types)):
            raise UserError(f"--keep-groups: {mistake}")
    else:
        types = None
        check_budget(args)
    if args.budget_memory is not None:
        find_options(args.budget_memory)
    if args.export is not None:
        find_target(args.export)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output: {str(args.output)!r} exists and is not empty; expected a new directory")
    probe_output("--output", args.output)
    if args.calibrate is not None and args.no_copy:
        raise UserError("--calibrate cannot be used with --no-copy: random projections are not calibrated")
    quiet_libraries()
    from subquad.data import check_data, spread_rows
    from subquad.modeling.budget import calibration_shape
    from subquad.modeling.linearize import linearize
    from subquad.modeling.teachers import check_reference, load_placed

    placement = placement_of(args)
    check_reference(args.teacher, "teacher")
    if args.calibrate is not None:
        with named("--calibrate"):
            check_data(Data(source=args.calibrate, seq_len=CALIBRATION_SHAPE[1]))
    teacher, tokenizer = load_placed(args.teacher, placement)
    ids, notes = None, ""
    if args.calibrate is not None:
        shape = CALIBRATION_SHAPE if args.budget is None else calibration_shape(teacher)
        with named("--calibrate"):
            ids = spread_rows(Data(source=args.calibrate), tokenizer, *shape)
    kept = rank_groups(args, teacher, tokenizer) if args.keep_groups is not None else []
    allocation = None
    if args.budget is not None:
        allocation, notes = spend_budget(args, teacher, ids, kept)
        types, ids = allocation.layer_types, None
    options = {"copy_qkv": not args.no_copy, "seed": args.seed, "export_target": args.export, "keep_groups": kept}
    student = linearize(teacher, layer_types=types, calibration_ids=ids, **options)
    if allocation is not None:
        allocation.set_memories(student)
    save_student(student, tokenizer, args, notes)


def check_budget(args: Namespace) -> None:
    """Raises UserError for options that exclude a budget."""
    options = {"--mixer": args.mixer, "--option": args.option, "--keep": args.keep, "--layer-types": args.layer_types}
    given = [name for name, value in {**options, "--no-copy": args.no_copy, "--export": args.export}.items() if value]
    if given:
        raise UserError(f"--budget cannot be used with {', '.join(given)}: it chooses a window for each key/value head")
    if args.calibrate is None:
        raise UserError("--budget: got no --calibrate SOURCE, expected a text on which the windows are measured")


def rank_groups(args: Namespace, teacher: Any, tokenizer: Any) -> list[tuple[int, int]]:
    """Layer and key/value head of the groups that the student keeps whole."""
    from subquad.config import Data
    from subquad.data import spread_rows
    from subquad.selection.ranking import top_groups
    from subquad.selection.texts import HAYSTACK

    with named("--calibrate"):
        haystack = spread_rows(Data(source=args.calibrate or "python-stdlib"), tokenizer, *HAYSTACK).flatten()
    kept = top_groups(teacher, tokenizer, haystack, args.keep_groups, by=args.keep_by, seed=args.seed)
    print(f"groups that keep all tokens (layer.head): {', '.join(f'{layer}.{head}' for layer, head in kept)}")
    return kept


def spend_budget(args: Namespace, teacher: Any, ids: Any, kept: list[tuple[int, int]]) -> tuple["Allocation", str]:
    """The windows and memories of a budget, and lines about it for the model card."""
    from subquad.modeling.budget import allocate_budget
    from subquad.modeling.summary import format_bytes

    found = allocate_budget(
        teacher,
        args.budget,
        ids,
        budget_context=args.budget_context,
        keep_groups=kept,
        seed=args.seed,
        memory=args.budget_memory,
    )
    windows = [window for own in found.windows for window in own]
    memories = sum(map(len, found.memory_heads))
    limited = [window for window in windows if window is not None]
    whole = f", and {len(windows) - len(limited)} keep all tokens" if len(limited) < len(windows) else ""
    lines = [
        f"budget {args.budget}: {len(limited)} key/value heads with windows of {min(limited, default=0)} to "
        f"{max(limited, default=0)} tokens and {found.sinks} sinks{whole}"
        + (f"; {memories} of them with a memory ({args.budget_memory})" if memories else ""),
        f"cache of a sequence: {format_bytes(found.cache_bytes)} of {format_bytes(found.budget_bytes)}"
        + (", besides the heads that keep all tokens" if whole else " at any length"),
        f"error by the calibration text: {sum(map(sum, found.errors)):.2f}; with one window of "
        f"{found.uniform_window} tokens for all: {found.uniform_error:.2f}",
    ]
    print("\n".join(lines))
    return found, "\n".join(["", *(f"- {line}" for line in lines), ""])


def save_student(student: Any, tokenizer: Any, args: Namespace, notes: str) -> None:
    """Saves the student with its tokenizer, model card and, if matplotlib is installed, a figure of its windows."""
    from subquad.modeling.layers import AttentionLayer
    from subquad.modeling.summary import model_card

    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    if notes:
        with suppress(ImportError):
            from subquad.analysis.plots import draw_windows

            layers = [layer.windows for layer in student.mixer_layers if isinstance(layer, AttentionLayer)]
            draw_windows(layers, f"Windows at a budget of {args.budget}", args.output)
            notes += "\n![windows of all key/value heads](windows.svg)\n"
    (args.output / "README.md").write_text(model_card(student.config, args.teacher, notes), encoding="utf-8")
    kind = "budgeted" if args.budget else "hybrid" if args.layer_types or args.keep else args.mixer or "gated_deltanet"
    print(f"{kind} student of {args.teacher}: {student.num_parameters():,} parameters, in {args.output}")


def read_layer_types(args: Namespace) -> dict[str, Any]:
    """The layer types of --layer-types, or of --mixer, --option and --keep. Raises UserError for all their mistakes."""
    from subquad.config.yaml_tree import parse_value
    from subquad.modeling.layer_types import LAYER_NUMBERS, find_mistakes

    if args.keep is not None and not LAYER_NUMBERS.fullmatch(args.keep):
        raise UserError(f"--keep: got {args.keep!r}, expected layer numbers like 9,19,29 or 0-3")
    if args.layer_types is None:
        spec = {"mixer": args.mixer or "gated_deltanet"}
        place = f"--mixer {spec['mixer']}"
        layer_types: dict[str, Any] = {"default": spec}
        for text in args.option:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--option {text}: expected NAME=VALUE")
            spec[name] = parse_value(value, f"--option {text}")
        layer_types |= {} if args.keep is None else {args.keep: "attention"}
    elif args.mixer is not None or args.option or args.keep is not None:
        raise UserError("--layer-types cannot be used with --mixer, --option or --keep: put them all inside it")
    else:
        place, layer_types = "--layer-types", parse_value(args.layer_types, "--layer-types")
        if not isinstance(layer_types, dict) or not layer_types:
            example = "'{default: gla, 1: attention}'"
            raise UserError(f"--layer-types: got {args.layer_types!r}, expected a mapping such as {example}")
    if mistakes := find_mistakes(layer_types):
        raise UserError(*(f"{place}: {key}: {message}" for key, message in mistakes))
    return layer_types


def run_mixers(args: Namespace) -> None:
    from dataclasses import fields

    from subquad.mixers import SOFTMAX
    from subquad.mixers.options import find_options
    from subquad.modeling.layer_types import MEMORIES, MERGES
    from subquad.registry import MIXERS

    if args.json:
        found = {name: find_options(name) for name in MIXERS}
        listed = [
            {"name": name, "source": own.source, "options": {field.name: field.default for field in fields(own)}}
            for name, own in found.items()
        ]
        control = {"name": SOFTMAX, "source": CONTROL, "options": {}}
        print(json.dumps([*listed, control], indent=2))
        return
    for name in MIXERS:
        options = find_options(name)
        print(f"{name}\n  {options.source}")
        print("  options: " + ", ".join(f"{field.name}={field.default}" for field in fields(options)))
    print(f"{SOFTMAX}\n  {CONTROL}")
    print("\nwith window=N every mixer remembers what has left a window of the teacher's attention")
    print(f"  options: sinks=0, merge={'|'.join(MERGES)}, memory={'|'.join(MEMORIES)}, memory_heads")


def run_inspect(args: Namespace) -> None:
    quiet_libraries()
    from subquad.modeling.summary import read_config, summary, summary_values

    config = read_config(args.directory)
    with as_user_error(f"{args.directory}: config.json describes no student that can be built"):
        text = json.dumps(summary_values(config), indent=2) if args.json else summary(config)
    print(text)


def run_generate(args: Namespace) -> None:
    if args.temperature < 0:
        raise UserError(f"--temperature: got {args.temperature}, expected 0 or more")
    quiet_libraries()
    import torch

    from subquad.modeling.teachers import check_reference, load_placed

    placement = placement_of(args)
    check_reference(args.model)
    model, tokenizer = load_placed(args.model, placement)
    if args.chat and not tokenizer.chat_template:
        raise UserError(f"--chat: {args.model} has no chat template")
    draft = load_draft(args.draft, args.draft_tokens, tokenizer, placement) if args.draft else None
    torch.manual_seed(args.seed)
    with as_user_error(f"{args.model}: cannot continue a text; its configuration or tokenizer may be damaged"):
        print(continued(model, tokenizer, args, draft))


def continued(model: Any, tokenizer: Any, args: Namespace, draft: Any) -> str:
    """The text that a model writes; without `--chat` the given text is in front of it."""
    import torch

    text: Any = args.text
    if args.chat:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    start = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    prompt = tokenizer(text, add_special_tokens=not args.chat).input_ids or start
    if not prompt:
        raise UserError("TEXT: got an empty text, and the model has no start token; expected some text")
    ids = torch.tensor([prompt], device=model.device)
    options: dict[str, Any] = {"do_sample": args.temperature > 0, "num_beams": 1, "num_return_sequences": 1}
    if args.temperature:
        options["temperature"] = args.temperature
    if draft is not None:
        options["assistant_model"] = draft
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, pad_token_id=pad, **options
    )
    return tokenizer.decode(out[0, len(prompt) if args.chat else 0 :], skip_special_tokens=True)


def load_draft(reference: str, tokens: int, tokenizer: Any, placement: "Placement") -> Any:
    """A model that proposes up to `tokens` tokens at a time to a model with this tokenizer."""
    from subquad.modeling.teachers import check_reference, load_placed

    check_reference(reference)
    draft, own = load_placed(reference, placement)
    if own.get_vocab() != tokenizer.get_vocab():
        raise UserError(f"--draft: {reference} has another vocabulary than the model")
    draft.generation_config.num_assistant_tokens = tokens  # type: ignore[union-attr]
    draft.generation_config.num_assistant_tokens_schedule = "constant"  # type: ignore[union-attr]
    return draft


def run_export(args: Namespace) -> None:
    quiet_libraries()
    from subquad.export import export

    print(export(args.directory, args.output, args.format, args.type))

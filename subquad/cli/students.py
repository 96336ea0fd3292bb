"""Commands on one model: linearize, mixers, inspect, generate, export."""

import argparse
from pathlib import Path
from typing import Any

from subquad.cli.parser import AddCommand
from subquad.utils import UserError, nearest, quiet_libraries

CALIBRATION_TOKENS = 2048
"""Tokens of text that `linearize --calibrate` reads."""


def add_commands(add: AddCommand) -> None:
    command = add(
        "linearize", run_linearize, "Replace a teacher's attention with mixers and save the untrained student."
    )
    command.add_argument("teacher", metavar="TEACHER", help="nano, smollm2-135m, a directory, a .gguf file or a hub id")
    command.add_argument("--output", "-o", required=True, metavar="DIR", help="new directory")
    command.add_argument("--mixer", help="mixer of every layer, see `subquad mixers` (default: gated_deltanet)")
    command.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the mixer")
    command.add_argument(
        "--layer-types", metavar="YAML", help="mixer or attention of each layer, as in '{default: gla, 0-3: attention}'"
    )
    command.add_argument("--no-copy", action="store_true", help="initialize the q, k, v and o projections at random")
    command.add_argument(
        "--calibrate",
        metavar="SOURCE",
        help="text source for calibration: qk_activation, rotary, half-life, beta, output scale (default: none)",
    )
    command.add_argument("--seed", type=int, default=0, help="seed of random initializations (default: 0)")
    command.add_argument("--export", metavar="TARGET", help="restrict the student to layers of qwen3_5, bamba ...")

    add("mixers", run_mixers, "List the mixers with their papers and options.")
    command = add("inspect", run_inspect, "Print a student's layers, options, parameters and cache size.")
    command.add_argument("directory", metavar="DIR", help="saved student")

    command = add("generate", run_generate, "Continue a text with a model.")
    command.add_argument("model", metavar="MODEL", help="a student, or what TEACHER of linearize may be")
    command.add_argument("text", metavar="TEXT", help="text to continue")
    command.add_argument("--tokens", type=int, default=64, help="maximum number of new tokens (default: 64)")
    command.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy decoding")
    command.add_argument("--seed", type=int, default=0, help="seed of sampling (default: 0)")
    command.add_argument("--chat", action="store_true", help="format TEXT as a user message with the chat template")

    command = add("export", run_export, "Convert a student to a model that runs without Subquad.")
    command.add_argument("directory", metavar="DIR", help="saved student")
    text = "gguf, which writes a file, or an export target, which writes a directory: qwen3_5, bamba ..."
    command.add_argument("--format", required=True, help=text)
    command.add_argument("--output", "-o", required=True, metavar="OUT", help="new directory or file")
    command.add_argument("--type", choices=["f32", "f16", "q8_0"], help="number format of a GGUF file (default: f16)")


def run_linearize(args: argparse.Namespace) -> None:
    from subquad.config import Data
    from subquad.modeling.export_target import find_target

    layer_types = read_layer_types(args)
    if args.export is not None:
        find_target(args.export)
    output = Path(args.output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"--output: {args.output!r} exists and is not empty; expected a new directory")
    if args.calibrate is not None and args.no_copy:
        raise UserError("--calibrate cannot be used with --no-copy: random projections are not calibrated")
    quiet_libraries()
    import torch

    from subquad.data import check_data, token_rows
    from subquad.modeling.linearize import linearize
    from subquad.modeling.summary import model_card
    from subquad.modeling.teachers import check_reference, load_teacher

    check_reference(args.teacher)
    data = None if args.calibrate is None else Data(source=args.calibrate, seq_len=256)
    if data is not None:
        check_data(data)
    teacher, tokenizer = load_teacher(args.teacher)
    calibration_ids = None
    if data is not None:
        rows = token_rows(data, tokenizer, "train", limit=CALIBRATION_TOKENS)
        calibration_ids = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
    student = linearize(
        teacher,
        layer_types=layer_types,
        copy_qkv=not args.no_copy,
        calibration_ids=calibration_ids,
        seed=args.seed,
        export_target=args.export,
    )
    student.save_pretrained(output)
    tokenizer.save_pretrained(output)
    name = Path(args.teacher).name if Path(args.teacher).expanduser().exists() else args.teacher
    (output / "README.md").write_text(model_card(student.config, name), encoding="utf-8")  # type: ignore[arg-type]
    kind = args.mixer or ("hybrid" if args.layer_types else "gated_deltanet")
    print(f"{kind} student of {args.teacher}: {student.num_parameters():,} parameters, in {args.output}")


def read_layer_types(args: argparse.Namespace) -> dict[str, Any]:
    """The layer types of --layer-types, or of --mixer and --option. Raises UserError for all their mistakes."""
    from subquad.config import yaml_tree
    from subquad.modeling.layer_types import find_mistakes

    if args.layer_types is not None:
        if args.mixer is not None or args.option:
            raise UserError("--layer-types cannot be used with --mixer or --option: put mixers and options inside it")
        layer_types = yaml_tree.parse_value(args.layer_types, "--layer-types")
        if not isinstance(layer_types, dict) or not layer_types:
            example = "'{default: gla, 1: attention}'"
            raise UserError(f"--layer-types: got {args.layer_types!r}, expected a mapping such as {example}")
        if mistakes := find_mistakes(layer_types):
            raise UserError(*(f"--layer-types: {key}: {message}" for key, message in mistakes))
        return layer_types
    spec: dict[str, Any] = {"mixer": args.mixer or "gated_deltanet"}
    for text in args.option:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--option {text}: expected NAME=VALUE")
        spec[name] = yaml_tree.parse_value(value, f"--option {text}")
    if mistakes := find_mistakes({"default": spec}):
        raise UserError(*(f"--mixer {spec['mixer']}: {message}" for _, message in mistakes))
    return {"default": spec}


def run_mixers(args: argparse.Namespace) -> None:
    from dataclasses import fields

    from subquad.mixers.options import find_options
    from subquad.registry import MIXERS

    for name in MIXERS:
        options = find_options(name)
        print(f"{name}\n  {options.source}")
        print("  options: " + ", ".join(f"{field.name}={field.default}" for field in fields(options)))
    print("softmax\n  The control: the teacher's own attention; with copy_qkv false its projections are random.")


def run_inspect(args: argparse.Namespace) -> None:
    quiet_libraries()
    from subquad.modeling.summary import read_config, summary

    print(summary(read_config(args.directory)))


def run_generate(args: argparse.Namespace) -> None:
    if args.tokens < 1:
        raise UserError(f"--tokens: got {args.tokens}, expected at least 1")
    if args.temperature < 0:
        raise UserError(f"--temperature: got {args.temperature}, expected 0 or more")
    quiet_libraries()
    import torch

    from subquad.modeling.teachers import check_reference, load_teacher

    check_reference(args.model)
    model, tokenizer = load_teacher(args.model)
    torch.manual_seed(args.seed)
    text = args.text
    if args.chat:
        if not tokenizer.chat_template:
            raise UserError(f"--chat: {args.model} has no chat template")
        message = [{"role": "user", "content": args.text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(text, add_special_tokens=not args.chat).input_ids
    if not prompt:
        prompt = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    if not prompt:
        raise UserError("TEXT: got an empty text, and the model has no start token; expected some text")
    ids = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, pad_token_id=pad, **sampling
    )
    print(tokenizer.decode(out[0, len(prompt) if args.chat else 0 :], skip_special_tokens=True))


def run_export(args: argparse.Namespace) -> None:
    from subquad.registry import EXPORT_TARGETS

    if args.format not in ("gguf", *EXPORT_TARGETS):
        raise UserError(f"--format: got {args.format!r}{nearest(args.format, [*EXPORT_TARGETS, 'gguf'])}")
    quiet_libraries()
    from subquad.export import export

    print(export(args.directory, args.output, args.format, args.type))

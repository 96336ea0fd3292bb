"""Commands on one model: linearize, mixers, inspect, generate, export."""

from argparse import Namespace
from pathlib import Path
from typing import Any

from subquad.cli.parser import Parser, count
from subquad.utils import UserError, quiet_libraries

CALIBRATION_TOKENS = 2048
"""Tokens of text that `linearize --calibrate` reads."""


def add_commands(parser: Parser) -> None:
    create = parser.command("linearize", run_linearize, "Replace attention with mixers and save the untrained student.")
    create.option("teacher", "TEACHER", "nano, smollm2-135m, a directory, a .gguf file or a hub id")
    create.option("--output -o", "DIR", "new directory", type=Path, required=True)
    create.option("--mixer", "NAME", "mixer of every layer, see `subquad mixers` (default: gated_deltanet)")
    create.option("--option", "NAME=VALUE", "option of the mixer", action="append", default=[])
    create.option("--layer-types", "YAML", "mixer or attention of each layer, as in '{default: gla, 0-3: attention}'")
    create.flag("--no-copy", "initialize the q, k, v and o projections at random")
    calibration = "text source for calibration: qk_activation, rotary, half-life, beta, output scale (default: none)"
    create.option("--calibrate", "SOURCE", calibration)
    create.option("--seed", "N", "seed of random initializations (default: 0)", type=int, default=0)
    create.option("--export", "TARGET", "restrict the student to layers of qwen3_5, bamba ...")
    parser.command("mixers", run_mixers, "List the mixers with their papers and options.")
    inspect = parser.command("inspect", run_inspect, "Print a student's layers, options, parameters and cache size.")
    inspect.option("directory", "DIR", "saved student")
    generate = parser.command("generate", run_generate, "Continue a text with a model.")
    generate.option("model", "MODEL", "a student, or what TEACHER of linearize may be")
    generate.option("text", "TEXT", "text to continue")
    generate.option("--tokens", "N", "maximum number of new tokens (default: 64)", type=count, default=64)
    generate.option("--temperature", "T", "0 (default): greedy decoding", type=float, default=0.0)
    generate.option("--seed", "N", "seed of sampling (default: 0)", type=int, default=0)
    generate.flag("--chat", "format TEXT as a user message with the chat template")
    export = parser.command("export", run_export, "Convert a student for transformers, vLLM, SGLang, llama.cpp or MLX.")
    export.option("directory", "DIR", "saved student")
    formats = "gguf, which writes a file, or an export target, which writes a directory: qwen3_5, bamba ..."
    export.option("--format", "FORMAT", formats, required=True)
    export.option("--output -o", "OUT", "new directory or file", required=True)
    export.option("--type", "TYPE", "number format of a GGUF file: f32, f16 (default) or q8_0")


def run_linearize(args: Namespace) -> None:
    from subquad.config import Data
    from subquad.modeling.export_target import find_target

    types = read_layer_types(args)
    if args.export is not None:
        find_target(args.export)
    if args.output.exists() and (not args.output.is_dir() or any(args.output.iterdir())):
        raise UserError(f"--output: {str(args.output)!r} exists and is not empty; expected a new directory")
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
    ids = None
    if data is not None:
        rows = token_rows(data, tokenizer, "train", limit=CALIBRATION_TOKENS)
        ids = torch.stack([rows[i]["input_ids"] for i in range(len(rows))])
    options = {"copy_qkv": not args.no_copy, "seed": args.seed, "export_target": args.export}
    student = linearize(teacher, layer_types=types, calibration_ids=ids, **options)
    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    name = Path(args.teacher).name if Path(args.teacher).expanduser().exists() else args.teacher
    (args.output / "README.md").write_text(model_card(student.config, name), encoding="utf-8")  # type: ignore[arg-type]
    kind = args.mixer or ("hybrid" if args.layer_types else "gated_deltanet")
    print(f"{kind} student of {args.teacher}: {student.num_parameters():,} parameters, in {args.output}")


def read_layer_types(args: Namespace) -> dict[str, Any]:
    """The layer types of --layer-types, or of --mixer and --option. Raises UserError for all their mistakes."""
    from subquad.config.yaml_tree import parse_value
    from subquad.modeling.layer_types import find_mistakes

    if args.layer_types is None:
        spec = {"mixer": args.mixer or "gated_deltanet"}
        place, layer_types = f"--mixer {spec['mixer']}", {"default": spec}
        for text in args.option:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--option {text}: expected NAME=VALUE")
            spec[name] = parse_value(value, f"--option {text}")
    elif args.mixer is not None or args.option:
        raise UserError("--layer-types cannot be used with --mixer or --option: put mixers and options inside it")
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

    from subquad.mixers.options import find_options
    from subquad.registry import MIXERS

    for name in MIXERS:
        options = find_options(name)
        print(f"{name}\n  {options.source}")
        print("  options: " + ", ".join(f"{field.name}={field.default}" for field in fields(options)))
    print("softmax\n  The control: the teacher's own attention; with copy_qkv false its projections are random.")


def run_inspect(args: Namespace) -> None:
    quiet_libraries()
    from subquad.modeling.summary import read_config, summary

    print(summary(read_config(args.directory)))


def run_generate(args: Namespace) -> None:
    if args.temperature < 0:
        raise UserError(f"--temperature: got {args.temperature}, expected 0 or more")
    quiet_libraries()
    import torch

    from subquad.modeling.teachers import check_reference, load_teacher

    check_reference(args.model)
    model, tokenizer = load_teacher(args.model)
    torch.manual_seed(args.seed)
    if args.chat and not tokenizer.chat_template:
        raise UserError(f"--chat: {args.model} has no chat template")
    text: Any = args.text
    if args.chat:
        message = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    start = [token for token in (tokenizer.bos_token_id, tokenizer.eos_token_id) if token is not None][:1]
    prompt = tokenizer(text, add_special_tokens=not args.chat).input_ids or start
    if not prompt:
        raise UserError("TEXT: got an empty text, and the model has no start token; expected some text")
    ids = torch.tensor([prompt], device=model.device)
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    out = model.generate(  # type: ignore[operator]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens, pad_token_id=pad, **sampling
    )
    print(tokenizer.decode(out[0, len(prompt) if args.chat else 0 :], skip_special_tokens=True))


def run_export(args: Namespace) -> None:
    quiet_libraries()
    from subquad.export import export

    print(export(args.directory, args.output, args.format, args.type))

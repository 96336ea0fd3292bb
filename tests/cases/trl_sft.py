"""trl's SFTTrainer on a student: by object, by path, packed, padding-free, assistant-only, with evaluation, LoRA, bf16."""

from common import *
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

home = OUT / "c19-student"
t, tok = subquad.load_teacher("nano")
tok.chat_template = "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
if not home.exists():
    s = subquad.linearize(t, "gated_deltanet")
    s.save_pretrained(home)
    tok.save_pretrained(home)
text = Dataset.from_list([{"text": "def f(x): return x + %d\n" % i * (1 + i % 5)} for i in range(24)])
chat = Dataset.from_list(
    [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"I say {i} and more" * (1 + i % 3)},
            ]
        }
        for i in range(24)
    ]
)


def args(**k):
    return SFTConfig(
        **{
            **dict(
                output_dir=str(OUT / "c19"),
                max_steps=3,
                per_device_train_batch_size=2,
                use_cpu=True,
                report_to="none",
                logging_steps=1,
                max_length=64,
                save_strategy="no",
                disable_tqdm=True,
                bf16=False,
                gradient_checkpointing=False,
            ),
            **k,
        }
    )


def run(data, model=None, **k):
    def go():
        extra = {n: k.pop(n) for n in ("peft_config", "eval_dataset") if n in k}
        m = model if model is not None else AutoModelForCausalLM.from_pretrained(home)
        tr = SFTTrainer(model=m, args=args(**k), train_dataset=data, processing_class=tok, **extra)
        tr.train()
        h = [x for x in tr.state.log_history if "loss" in x]
        ev = tr.evaluate() if "eval_dataset" in extra else {}
        assert all(x["loss"] == x["loss"] for x in h)
        return f"loss {h[0]['loss']:.3f} -> {h[-1]['loss']:.3f}; accuracy {h[-1].get('mean_token_accuracy')}" + (
            f"; eval {ev.get('eval_loss'):.3f}" if ev else ""
        )

    return go


attempt("SFT, student object", run(text))
attempt("SFT, gradient checkpointing", run(text, gradient_checkpointing=True))
attempt("SFT, evaluation", run(text, eval_dataset=text.select(range(4))))
attempt("SFT, model given as a path", run(text, model=str(home)))
attempt("SFT, packing (bfd)", run(text, packing=True))
attempt("SFT, padding_free", run(text, padding_free=True))
attempt("SFT, assistant_only_loss", run(chat, assistant_only_loss=True))
attempt("SFT, bf16", run(text, bf16=True))
attempt("SFT, gradient accumulation", run(text, gradient_accumulation_steps=2))
attempt("SFT, loss_type chunked_nll", run(text, loss_type="chunked_nll"))
attempt("SFT, loss_type dft", run(text, loss_type="dft"))
from peft import LoraConfig

attempt(
    "SFT, LoRA all-linear", run(text, peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
)
attempt("SFT, LoRA without targets", run(text, peft_config=LoraConfig(r=4, task_type="CAUSAL_LM")))
for label, kw in (
    ("packing", dict(packing=True)),
    ("padding_free", dict(padding_free=True)),
    ("chunked_nll", dict(loss_type="chunked_nll")),
):
    attempt(
        f"(control: nano itself, {label})",
        run(
            text,
            model=AutoModelForCausalLM.from_pretrained(Path(subquad.__file__).parent / "nano", dtype=torch.float32),
            **kw,
        ),
    )

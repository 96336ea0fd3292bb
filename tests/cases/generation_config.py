"""Teachers whose own generation_config.json mixes sampling values with greedy decoding (Vicuna, Llama 2 chat, ...):
can a student of one be made, saved and distilled?"""

from common import *

from subquad.cli import main

CONFIGS = {
    "temperature without do_sample": {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "temperature": 0.9,
        "top_p": 0.6,
    },
    "do_sample false": {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
        "do_sample": False,
        "temperature": 0.9,
    },
    "hybrid cache and temperature": {
        "bos_token_id": 0,
        "eos_token_id": 0,
        "cache_implementation": "hybrid",
        "temperature": 0.6,
    },
    "hybrid cache alone (Gemma 2)": {"bos_token_id": 0, "eos_token_id": 0, "cache_implementation": "hybrid"},
    "num_beams leftover": {"bos_token_id": 0, "eos_token_id": 0, "length_penalty": 0.8, "early_stopping": True},
}
print("transformers", transformers.__version__)
for i, (label, values) in enumerate(CONFIGS.items()):
    home = nano_copy(f"c01-teacher-{i}", values)

    def plain():
        m = AutoModelForCausalLM.from_pretrained(home)
        m.save_pretrained(fresh(f"c01-plain-{i}"))

    def fresh_student():
        t, tok = subquad.load_teacher(home)
        s = subquad.linearize(t, "gla")
        s.save_pretrained(fresh(f"c01-student-{i}"))
        AutoModelForCausalLM.from_pretrained(OUT / f"c01-student-{i}").save_pretrained(fresh(f"c01-again-{i}"))

    attempt(f"[{label}] transformers saves the teacher itself", plain)
    attempt(f"[{label}] linearize, save, load, save", fresh_student)
    if "--distill" in sys.argv:
        recipe = OUT / f"c01-{i}.yaml"
        recipe.write_text(f"""teacher: {home}
data: {{source: {TEXT}, seq_len: 64}}
student: {{mixer: gla, calibration_tokens: 64}}
stages:
  hidden: {{tokens: 512, lr: 1.0e-3, batch_size: 2}}
evaluation: {{eval_tokens: 256}}
""")

        def distil():
            rc = main(["distill", str(recipe), "--output", str(fresh(f"c01-run-{i}"))])
            assert rc == 0, f"exit code {rc}"
            assert (OUT / f"c01-run-{i}" / "result.json").exists()

        attempt(f"[{label}] subquad distill", distil)

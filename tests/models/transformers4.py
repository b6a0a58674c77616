"""What transformers 4 reads in exported folders: run by a Python that has it, as ``test_transformers4.py`` does.

    python tests/models/transformers4.py REQUEST.json RESULT.json

The request has the folders ``policy``, ``classifier`` and ``tokenizer``, ``texts``, and ``rows`` of token ids.
"""

import json
import sys
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer


def read_policy(folder, texts, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32).eval()
    messages = [{"role": "user", "content": texts[0]}]
    with torch.no_grad():
        logits = [model(torch.tensor([row])).logits[0].tolist() for row in rows]
        drawn = model.generate(torch.tensor([rows[0]] * 8), do_sample=True, temperature=5.0, max_new_tokens=16)
    return {
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in texts],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) for text in texts],
        "special": sorted(tokenizer.all_special_tokens),
        "prompt": tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False),
        "logits": logits,
        "eos": model.generation_config.eos_token_id,
        "drawn": drawn[:, len(rows[0]) :].tolist(),
    }


def read_classifier(folder, rows):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, torch_dtype=torch.float32).eval()
    scores = {}
    for side in ("left", "right"):
        batch = tokenizer.pad({"input_ids": rows}, padding_side=side, return_tensors="pt")
        with torch.no_grad():
            scores[side] = model(**batch).logits[:, 0].tolist()
    return {"pad": tokenizer.pad_token_id, "scores": scores}


def main(request_file, result_file):
    request = json.loads(Path(request_file).read_text())
    result = {"version": transformers.__version__}
    result["policy"] = read_policy(request["policy"], request["texts"], request["rows"])
    result["classifier"] = read_classifier(request["classifier"], request["rows"])
    tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
    result["tokenizer"] = {
        "ids": [tokenizer(text)["input_ids"] for text in request["texts"]],
        "special": sorted(tokenizer.all_special_tokens),
    }
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])

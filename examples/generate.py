"""Continue a text with an exported model: an ordinary Hugging Face folder, narrowgauge is not needed.

python examples/generate.py FOLDER PROMPT
"""

import sys

from transformers import pipeline

folder, prompt = sys.argv[1:]
generate = pipeline("text-generation", model=folder)
print(generate(prompt, max_new_tokens=16, do_sample=False)[0]["generated_text"])

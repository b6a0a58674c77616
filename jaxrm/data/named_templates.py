"""The chat templates that have names here, in Jinja that ``transformers`` renders to the same text."""

# Gemma and Llama 2 have no system turn: its text goes before the first message of the user.
_SYSTEM_FIRST = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = ns.system + system_open + m.content | trim + system_close %}{% else %}"
)

# White space around a message is dropped, as the templates of Llama and Gemma do; ``plain`` keeps it.
TEMPLATES = {
    "chatml": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "llama2": "{% set system_open = '<<SYS>>\n' %}{% set system_close = '\n<</SYS>>\n\n' %}"
    + _SYSTEM_FIRST
    + "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + ns.system + m.content | trim + ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endif %}"
    "{% endfor %}",
    "gemma": "{% set system_open = '' %}{% set system_close = '\n\n' %}{{ bos_token }}"
    + _SYSTEM_FIRST
    + "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + ns.system + m.content | trim "
    "+ '<end_of_turn>\n' }}{% set ns.system = '' %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "hh": "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '\n\nAssistant: ' + m.content | trim + eos_token }}{% elif m.role == 'user' %}"
    "{{ '\n\nHuman: ' + m.content | trim }}{% else %}{{ m.content | trim }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}",
    "plain": "{{ bos_token }}{% for m in messages %}{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}",
}
NEEDED_TOKENS = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}

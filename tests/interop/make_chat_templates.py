#!/usr/bin/env python3
"""Renders conversations through chat templates of well-known styles, as transformers does.

Writes tests/goldens/chat/STYLE.jinja and STYLE.json: for every conversation the variables and the
text, or the words in which the template refuses it.

Needs: pip install transformers tokenizers jinja2
"""

import json
import pathlib

from jinja2.exceptions import TemplateError, UndefinedError
from transformers import PreTrainedTokenizerFast

ROOT = pathlib.Path(__file__).parent.parent / "goldens"
OUT = ROOT / "chat"

CHATML = """{%- for message in messages %}
    {%- if loop.first and message['role'] != 'system' %}
        {{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Cutting Knowledge Date: December 2023\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'+ message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- else %}
        {{- "<|start_header_id|>ipython<|end_header_id|>\\n\\n" }}
        {%- if message.content is mapping or message.content is iterable %}
            {{- message.content | tojson }}
        {%- else %}
            {{- message.content }}
        {%- endif %}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

MISTRAL = """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if not (message.role == "tool" or (message.tool_calls is defined and message.tool_calls is not none)) %}
        {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
            {{- raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
        {%- endif %}
        {%- set ns.index = ns.index + 1 %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"]|trim + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}"""

TOOLS = """{%- macro describe(tool, depth=0) -%}
    {{ '  ' * depth }}- {{ tool.function.name }}({{ tool.function.parameters.properties.items() | map('first') | join(', ') }})
    {%- for name, property in tool.function.parameters.properties | dictsort %}

      {{ name }}: {{ property.type | default('any') | upper }}{{ ' = ' ~ property.default if property.default is defined }}
    {%- endfor %}
{%- endmacro %}
{% set counter = namespace(calls=0, seen=[]) %}
{% if tools %}
<tools>
{% for tool in tools if tool.type == 'function' %}
{{ describe(tool, loop.index0) }}
{{ tool | tojson }}
{% endfor %}
</tools>
{% endif %}
{# a comment that leaves no trace #}
{% for message in messages %}
    {% if message.content is string %}
        {% set content = message.content %}
    {% elif message.content is iterable and message.content is not mapping %}
        {% set content %}
            {%- for part in message.content -%}
                {%- if part.type == 'text' -%}{{ part.text }}{%- else -%}<{{ part.type }}>{%- endif -%}
            {%- endfor -%}
        {% endset %}
    {% else %}
        {% set content = '' %}
    {% endif %}
    {% if message.role == 'assistant' %}
{% generation %}[{{ message.role | capitalize }}] {{ content.split('</think>')[-1].lstrip('\\n').rstrip() }}
{% for call in message.tool_calls or [] %}
    {% set counter.calls = counter.calls + 1 %}
    {% set counter.seen = counter.seen + [call.function.name] %}
{{ call.function.name }}#{{ counter.calls }} {{ call.function.arguments | tojson(sort_keys=true) }}
{% endfor %}
{% endgeneration %}
    {% else %}
[{{ message.role.upper() }}] {{ content.replace('\\t', '    ') | indent(2) }} {{ content | length }}
    {% endif %}
    {% if loop.index > 6 %}{% break %}{% endif %}
{% endfor %}
Calls: {{ counter.calls }}, {{ counter.seen }}, {{ counter.seen | unique | sort | list }}, {{ (counter.seen | length) / 2 }}, {{ none }}, {{ true }}, {{ messages[-1].role[::-1] }}, {{ messages[:1] | length }}{{ "!" if add_generation_prompt else "." }}
"""

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather \"now\" in a café, <b>é</b> & 漢字.",
        "parameters": {
            "type": "object",
            "properties": {
                "where": {"type": "string", "description": "A place"},
                "hours": {"type": "integer", "default": 3, "minimum": 0.5, "maximum": 1e22},
                "deep": {"default": None, "enum": [True, False, 1e-07, 1.0, -2, []]},
            },
            "required": ["where"],
        },
    },
}

U = lambda text: {"role": "user", "content": text}
A = lambda text: {"role": "assistant", "content": text}
S = lambda text: {"role": "system", "content": text}

CALL = {"role": "assistant", "content": None, "tool_calls": [
    {"type": "function", "function": {"name": "get_weather", "arguments": {"where": "Ålesund", "hours": 2}}}]}

CASES = [
    {"messages": [U("Hi")], "add_generation_prompt": True},
    {"messages": [U("Hi"), A("Hello!"), U("  How are you?\n")], "add_generation_prompt": True},
    {"messages": [S(" Be brief. "), U("1 + 1?"), A("2")], "add_generation_prompt": False},
    {"messages": [S("Sei kurz."), U("漢字 <|im_end|> 🎉 'quoted' \"double\" \\ {{ 7 * 7 }}")], "add_generation_prompt": True},
    {"messages": [U("a"), U("b")], "add_generation_prompt": True},
    {"messages": [U("a"), A("<think>\nhm\n</think>\n\nb  "), U("c\n\td")], "add_generation_prompt": True, "enable_thinking": False},
    {"messages": [U("Weather?"), dict(CALL), {"role": "tool", "content": "{\"rain\": 1.5}"}, A("Rain.")],
     "tools": [WEATHER], "add_generation_prompt": True},
    {"messages": [U([{"type": "text", "text": "What is "}, {"type": "image"}, {"type": "text", "text": "?"}])],
     "add_generation_prompt": True},
]

STYLES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "tools": TOOLS}


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(ROOT / "tokenizers" / "metaspace_first" / "tokenizer.json"),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    for style, template in STYLES.items():
        (OUT / f"{style}.jinja").write_text(template)
        cases = []
        for case in CASES:
            case = {**case, "date_string": "02 Jan 2025"}
            arguments = dict(case)
            messages = arguments.pop("messages")
            entry = {"input": case}
            try:
                entry["text"] = tok.apply_chat_template(
                    messages, chat_template=template, tokenize=False, **arguments)
            except (TypeError, UndefinedError) as error:
                entry["failed"] = str(error)
            except TemplateError as error:
                entry["refused"] = str(error)
            cases.append(entry)
        specials = {name: token for name, token in tok.special_tokens_map.items()}
        (OUT / f"{style}.json").write_text(
            json.dumps({"special_tokens": specials, "cases": cases}, ensure_ascii=False, indent=1) + "\n")
        print(style, [next(k for k in c if k != "input") for c in cases])


if __name__ == "__main__":
    main()

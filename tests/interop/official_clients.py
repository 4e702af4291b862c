"""Talks to `cairn serve` with OpenAI's and Anthropic's own clients, unchanged.

Each of their ways to ask is used once, whole and streamed, and what the clients' own types make of the answers is
compared: a stream says what the whole answer says, and a chat is the same in all three forms. Then functions are
called in all three forms, with a template that has a form for calls, and what came of them is given back.

    pip install openai anthropic
    python tests/interop/official_clients.py --cairn target/release/cairn [--model tests/goldens/gguf/chat.gguf]
"""

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--cairn", required=True)
parser.add_argument("--model", default="tests/goldens/gguf/chat.gguf")
args = parser.parse_args()

import anthropic
import openai



def start(model, *more):
    """A server and its address."""
    command = [args.cairn, "serve", "--port", "0", "--served-model-name", "m", "--model", model, *more]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in server.stderr:
        if found := re.search(r"http://\S+", line):
            # What it says later must find a reader.
            threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()
            return server, found.group()
    raise AssertionError("it says where it listens")


def clients(address):
    ours = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
    return ours, anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0)


server, address = start(args.model)
ours, theirs = clients(address)
MESSAGES = [{"role": "user", "content": "Hi"}]
checks = 0


def check(what, is_right):
    global checks
    assert is_right, what
    checks += 1


try:
    check("models", [model.id for model in ours.models.list()] == ["m"])
    check("one model", ours.models.retrieve("m").id == "m")

    asked = dict(model="m", prompt="one stone", max_tokens=12, temperature=0)
    whole = ours.completions.create(**asked, logprobs=2)
    text = whole.choices[0].text
    check("a completion", whole.usage.completion_tokens == len(whole.choices[0].logprobs.tokens) > 0)
    pieces = list(ours.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    check("a streamed completion", "".join(c.choices[0].text for c in pieces if c.choices) == text)
    check("its usage", pieces[-1].usage.total_tokens == whole.usage.total_tokens)
    several = ours.completions.create(model="m", prompt=["a", "b"], n=2, max_tokens=4, seed=7)
    check("several", [choice.index for choice in several.choices] == [0, 1, 2, 3])

    asked = dict(model="m", messages=MESSAGES, max_tokens=8, temperature=0)
    chat = ours.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    said = chat.choices[0].message.content
    check("a chat", chat.choices[0].message.role == "assistant" and said)
    check("log-probabilities", len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens)
    chunks = list(ours.chat.completions.create(**asked, stream=True))
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    check("a streamed chat", "".join(deltas) == said)
    check("its end", chunks[-1].choices[0].finish_reason == chat.choices[0].finish_reason)
    with ours.chat.completions.stream(**asked) as stream:
        collected = "".join(event.delta for event in stream if event.type == "content.delta")
    check("the client's own events", collected == said)

    asked = dict(model="m", input="Hi", max_output_tokens=8, temperature=0)
    response = ours.responses.create(**asked)
    check("a response", response.output_text == said)
    with ours.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
    check("a streamed response", kinds[0] == "response.created" and kinds[-1] == f"response.{response.status}")

    for wrong, kind in [
        (dict(model="nobody", messages=MESSAGES), openai.NotFoundError),
        (dict(model="m", messages=[]), openai.BadRequestError),
        (dict(model="m", messages=MESSAGES, temperature=-1), openai.BadRequestError),
    ]:
        try:
            ours.chat.completions.create(**wrong)
            check(f"{wrong} is refused", False)
        except kind as error:
            check("the field is named", error.body["message"] and error.param)

    asked = dict(model="m", messages=MESSAGES, max_tokens=8)
    message = theirs.messages.create(**asked, extra_body={"temperature": 0})
    check("a message", message.content[0].text == said and message.usage.output_tokens > 0)
    with theirs.messages.stream(**asked, extra_body={"temperature": 0}) as stream:
        streamed = "".join(stream.text_stream)
        final = stream.get_final_message()
    check("a streamed message", streamed == said)
    check("its end", final.stop_reason == message.stop_reason)
    check("its usage", final.usage.output_tokens == message.usage.output_tokens)
    counted = theirs.messages.count_tokens(model="m", messages=MESSAGES)
    usage = message.usage
    check("counting", counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens)
    try:
        theirs.messages.create(model="nobody", messages=MESSAGES, max_tokens=1)
        check("a wrong model is refused", False)
    except anthropic.NotFoundError as error:
        check("as Anthropic does", error.body["error"]["type"] == "not_found_error")
finally:
    server.terminate()
    status = server.wait(60)
assert status == 0, f"the server ended with {status}"

# Descriptions of functions are long: the same model with more positions.
scratch = tempfile.TemporaryDirectory()
shutil.copytree("tests/goldens/gguf/chat", scratch.name, dirs_exist_ok=True)
config = Path(scratch.name, "config.json")
config.write_text(json.dumps(json.loads(config.read_text()) | {"max_position_embeddings": 2048}))
server, address = start(
    scratch.name, "--chat-template", "tests/goldens/chat/calls_hermes.jinja", "--max-model-len", "1024",
)
ours, theirs = clients(address)
SCHEMA = {
    "type": "object",
    "properties": {"where": {"type": "string", "maxLength": 4}, "hours": {"enum": [1, 2]}},
    "required": ["where", "hours"],
    "additionalProperties": False,
}


def is_right(arguments):
    return set(arguments) == {"where", "hours"} and len(arguments["where"]) <= 4 and arguments["hours"] in (1, 2)


try:
    function = dict(name="rain", description="How it rains.", parameters=SCHEMA, strict=True)
    asked = dict(
        model="m", messages=MESSAGES, max_tokens=120, seed=3, tools=[dict(type="function", function=function)],
    )
    forced = dict(type="function", function=dict(name="rain"))
    chat = ours.chat.completions.create(**asked, tool_choice=forced)
    choice = chat.choices[0]
    (call,) = choice.message.tool_calls
    check("a call", choice.finish_reason == "tool_calls" and call.function.name == "rain")
    check("its arguments", is_right(json.loads(call.function.arguments)))
    with ours.chat.completions.stream(**asked, tool_choice=forced) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    (streamed,) = final.choices[0].message.tool_calls
    check("a streamed call", streamed.function.arguments == call.function.arguments)
    check("its events", "tool_calls.function.arguments.done" in kinds)
    check("it is parsed", streamed.function.parsed_arguments == json.loads(call.function.arguments))
    required = ours.chat.completions.create(**asked, tool_choice="required", parallel_tool_calls=False)
    check("some call", len(required.choices[0].message.tool_calls) == 1)
    result = dict(role="tool", tool_call_id=call.id, content="wet")
    back = asked | dict(messages=MESSAGES + [choice.message, result], max_tokens=4)
    check("its result", ours.chat.completions.create(**back, tool_choice="none").usage.completion_tokens > 0)
    try:
        ours.chat.completions.create(**back | dict(messages=MESSAGES + [result]))
        check("a result of nothing is refused", False)
    except openai.BadRequestError as error:
        check("its field is named", error.param == "messages")

    tool = dict(type="function", name="rain", parameters=SCHEMA, strict=True)
    asked = dict(model="m", input="Hi", max_output_tokens=120, temperature=0, tools=[tool])
    forced = dict(type="function", name="rain")
    response = ours.responses.create(**asked, tool_choice=forced)
    (item,) = response.output
    check("a response's call", item.type == "function_call" and is_right(json.loads(item.arguments)))
    with ours.responses.stream(**asked, tool_choice=forced) as stream:
        kinds = [event.type for event in stream]
        (final,) = stream.get_final_response().output
    check("streamed", final.arguments == item.arguments and "response.function_call_arguments.delta" in kinds)
    output = dict(type="function_call_output", call_id=item.call_id, output="wet")
    back = asked | dict(input=[dict(role="user", content="Hi"), item, output], max_output_tokens=4)
    check("its output", ours.responses.create(**back, tool_choice="none").usage.output_tokens > 0)

    tool = dict(name="rain", description="How it rains.", input_schema=SCHEMA)
    asked = dict(model="m", messages=MESSAGES, max_tokens=120, tools=[tool], extra_body={"temperature": 0})
    forced = dict(type="tool", name="rain")
    message = theirs.messages.create(**asked, tool_choice=forced)
    (block,) = message.content
    check("a message's call", message.stop_reason == "tool_use" and is_right(block.input))
    with theirs.messages.stream(**asked, tool_choice=forced) as stream:
        kinds = [event.type for event in stream]
        (final,) = stream.get_final_message().content
    check("streamed", final.type == "tool_use" and final.input == block.input and "input_json" in kinds)
    result = dict(type="tool_result", tool_use_id=block.id, content="wet")
    conversation = MESSAGES + [
        dict(role="assistant", content=message.content),
        dict(role="user", content=[result, dict(type="text", text="So?")]),
    ]
    back = asked | dict(messages=conversation, max_tokens=4, tool_choice=dict(type="none"))
    check("its result", theirs.messages.create(**back).usage.output_tokens > 0)
finally:
    server.terminate()
    status = server.wait(60)
assert status == 0, f"the server ended with {status}"

# The small BERT with a tokenizer of word pieces.
for name in ("config.json", "model.safetensors"):
    shutil.copy(Path("tests/goldens/bert", name), scratch.name)
for name in ("tokenizer.json", "tokenizer_config.json"):
    shutil.copy(Path("tests/goldens/tokenizers/word_piece", name), scratch.name)
server, address = start(scratch.name, "--pooling", "mean")
ours, _ = clients(address)
try:
    texts = ["one stone", "two"]
    found = ours.embeddings.create(model="m", input=texts)
    plain = ours.embeddings.create(model="m", input=texts, encoding_format="float")
    vectors, expected = ([entry.embedding for entry in answer.data] for answer in (found, plain))
    near = all(abs(a - b) < 1e-6 for v, w in zip(vectors, expected) for a, b in zip(v, w))
    check("vectors as bytes and as numbers", near and len(vectors) == 2 and len(vectors[0]) > 8)
    check("their usage", found.usage.total_tokens == plain.usage.prompt_tokens > 0)
    try:
        ours.embeddings.create(model="m", input="a", dimensions=3)
        check("other dimensions are refused", False)
    except openai.BadRequestError as error:
        check("by name", error.param == "dimensions")
finally:
    server.terminate()
    status = server.wait(60)
assert status == 0, f"the server ended with {status}"
print(f"openai {openai.__version__}, anthropic {anthropic.__version__}: {checks} checks, all right")

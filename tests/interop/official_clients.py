"""Talks to `cairn serve` with OpenAI's and Anthropic's own clients, unchanged.

Each of their ways to ask is used once, whole and streamed, and what the clients' own types make of the answers is
compared: a stream says what the whole answer says, and a chat is the same in all three forms.

    pip install openai anthropic
    python tests/interop/official_clients.py --cairn target/release/cairn [--model tests/goldens/gguf/chat.gguf]
"""

import argparse
import re
import subprocess
import threading

parser = argparse.ArgumentParser()
parser.add_argument("--cairn", required=True)
parser.add_argument("--model", default="tests/goldens/gguf/chat.gguf")
args = parser.parse_args()

import anthropic
import openai

server = subprocess.Popen(
    [args.cairn, "serve", "--port", "0", "--served-model-name", "m", "--model", args.model],
    stderr=subprocess.PIPE, text=True,
)
address = None
for line in server.stderr:
    found = re.search(r"http://\S+", line)
    if found:
        address = found.group()
        break
assert address, "it says where it listens"
# What it says later must find a reader.
threading.Thread(target=lambda: [None for _ in server.stderr], daemon=True).start()

ours = openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)
theirs = anthropic.Anthropic(base_url=address, api_key="unused", max_retries=0)
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
print(f"openai {openai.__version__}, anthropic {anthropic.__version__}: {checks} checks, all right")

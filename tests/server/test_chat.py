"""POST /v1/chat/completions with the official client."""

MESSAGES = [{"role": "user", "content": "Hello there"}]


def test_plain(server):
    answer = server.openai().chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=8)
    print(answer)
    assert answer.choices[0].message.content
    chunks = list(server.openai().chat.completions.create(model="tiny", messages=MESSAGES, max_completion_tokens=8, stream=True))
    print(chunks[-1])
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == answer.choices[0].message.content

from dsv4.data import tokenizer
from dsv4.text import tokens


def test_each_token_is_there_once_and_named_as_it_is():
    assert len(set(tokens.SPECIAL_TOKENS)) == len(tokens.SPECIAL_TOKENS) == 22
    named = {tokens.BOS, tokens.EOS, tokens.USER, tokens.ASSISTANT, tokens.LATEST_REMINDER, tokens.THINK,
             tokens.END_THINK, tokens.DSML, tokens.EXTRACTED_URL, *tokens.TASKS.values()}  # fmt: skip
    assert named <= set(tokens.SPECIAL_TOKENS)
    assert len(named) == 15
    assert tokens.TASKS["read_url"] == "<\uff5cread_url\uff5c>"
    assert tokens.BOS == "<\uff5cbegin\u2581of\u2581sentence\uff5c>"


def test_the_tokenizer_has_the_same():
    assert tokenizer.SPECIAL_TOKENS is tokens.SPECIAL_TOKENS
    assert tokenizer.EOS is tokens.EOS

"""The page before the server it belongs to: the same origin, the same fields, the same stream."""

from playwright.sync_api import expect


def test_a_question_and_its_answer(open_page, address, says):
    """Thinking, text, figures and a tool's round come through the real API."""
    asked = says(
        "I add.</think>It is **42**.",
        "I look.</think>\n\n<\uff5cDSML\uff5ctool_calls>\n"
        '<\uff5cDSML\uff5cinvoke name="lookup">\n'
        '<\uff5cDSML\uff5cparameter name="key" string="true">price of tea</\uff5cDSML\uff5cparameter>\n'
        "</\uff5cDSML\uff5cinvoke>\n</\uff5cDSML\uff5ctool_calls>",
        "I know.</think>3 euros.",
    )
    page = open_page(url=address, name="toy")
    page.get_by_role("button", name="Options").click()
    page.get_by_label("Lookup in this table").check()
    for question in ("What is 17 + 25?", "What is the price of tea?"):
        page.get_by_label("Your message").fill(question)
        page.keyboard.press("Enter")
        expect(page.locator("#stop")).to_be_hidden()
    expect(page.locator(".answer .text")).to_have_text(["It is 42.", "", "3 euros."])
    expect(page.locator(".thoughts")).to_have_text(["I add.", "I look.", "I know."])
    expect(page.locator(".result code")).to_have_text("3 euros")
    expect(page.locator(".figures").first).to_contain_text("128 from cache")
    assert "3 euros" in asked[2]["prompt"]
    assert "I look." in asked[2]["prompt"]

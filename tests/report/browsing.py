"""How the tests drive a page in a browser."""

import json
import time


def load(browser, page, address=""):
    browser.get("about:blank")
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get(page.as_uri() + address)


def clean(browser):
    """No complaint in the console, and nothing asked of any network."""
    assert browser.get_log("browser") == []
    events = [json.loads(e["message"])["message"] for e in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return all(url.startswith(("file:", "data:")) for url in asked) and bool(asked)


def css(browser, selector):
    return browser.find_elements("css selector", selector)


def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
    return found


def press(browser, key):
    browser.switch_to.active_element.send_keys(key)

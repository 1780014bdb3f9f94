"""What the tests of pages share: keys, drags and downloads of a page in a browser."""

import json
import time


class Page:
    """A page in the browser, driven as a person would."""

    def __init__(self, browser, path):
        self.browser, self.url = browser, path.as_uri()
        self.open()
        browser.execute_script("localStorage.clear()")  # whoever judged the same page before
        self.open()

    def open(self):
        self.browser.get(self.url)

    def press(self, *keys):
        from selenium.webdriver import ActionChains, Keys

        names = {"<-": Keys.ARROW_LEFT, "->": Keys.ARROW_RIGHT, "down": Keys.ARROW_DOWN}
        names |= {"enter": Keys.ENTER, "back": Keys.BACKSPACE}
        for key in keys:
            ActionChains(self.browser, duration=20).send_keys(names.get(key, key)).perform()

    def find(self, selector):
        return self.browser.find_element("css selector", selector)

    def texts(self, selector):
        return [x.text for x in self.browser.find_elements("css selector", selector)]

    def click(self, selector):
        self.find(selector).click()

    def drag(self, chip, target):
        from selenium.webdriver import ActionChains

        chain = ActionChains(self.browser, duration=20)
        chain.drag_and_drop(self.find(chip), self.find(target)).perform()

    def responses(self):
        return self.texts(".cards .text")

    def letter(self, response):
        """The key of a response, whatever place it is shown at."""
        return "abcdefghi"[self.responses().index(response)]

    def download(self):
        """(path, rows) of what the download button wrote, until the next download."""
        for earlier in self.browser.downloads.iterdir():
            earlier.unlink()
        self.click("#download")
        for _ in range(200):
            for path in self.browser.downloads.glob("*.jsonl"):
                return path, [json.loads(line) for line in path.read_text("utf-8").split("\n")[:-1]]
            time.sleep(0.05)
        raise AssertionError("nothing was downloaded")

    def errors(self):
        return self.browser.get_log("browser")

"A browser without a window, driven through its DevTools protocol"
import json
import re
import shutil
import subprocess
import tempfile
import time
import urllib.request
from base64 import b64decode

NAMES = 'chromium', 'chromium-browser', 'google-chrome', 'chrome'


def find_browser(): return next(filter(None, map(shutil.which, NAMES)), None)


def browser_version():
    said = subprocess.run([find_browser(), '--version'], capture_output=True, text=True).stdout
    return re.search(r'[\d.]+', said)[0]


class Browser:
    "One page of Chromium"
    def __init__(self, width, height, dark=False):
        from websocket import create_connection
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        flags = ('--headless=new --no-sandbox --disable-gpu --hide-scrollbars --disable-extensions '
                 '--remote-debugging-port=0 --remote-allow-origins=*').split()
        self.process = subprocess.Popen(
            [find_browser(), *flags, f'--user-data-dir={self.folder.name}', 'about:blank'],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        said = next(line for line in self.process.stderr if 'DevTools listening on' in line)
        port = said.split(':')[-1].split('/')[0]
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/json') as tabs:
            page = next(t for t in json.load(tabs) if t['type'] == 'page')
        self.socket, self.n = create_connection(page['webSocketDebuggerUrl'], timeout=60), 0
        self.errors, self.asked = [], []  # what went wrong on the page; addresses that it asked
        for domain in ('Page', 'Runtime', 'Log', 'Network'): self(f'{domain}.enable')
        self.resize(width, height)
        scheme = dict(name='prefers-color-scheme', value='dark' if dark else 'light')
        self('Emulation.setEmulatedMedia', features=[scheme])

    def __enter__(self): return self
    def __exit__(self, *how):
        self.socket.close()
        self.process.terminate()
        self.process.wait()
        self.process.stderr.close()
        self.folder.cleanup()

    def __call__(self, method, **params):
        "Ask the browser for something; its answer"
        self.n += 1
        self.socket.send(json.dumps(dict(id=self.n, method=method, params=params)))
        while (m := json.loads(self.socket.recv())).get('id') != self.n: self._note(m)
        assert 'error' not in m, m
        return m['result']

    def _note(self, m):
        kind, about = m['method'], m['params']
        if kind == 'Runtime.exceptionThrown': self.errors.append(about['exceptionDetails'])
        if kind == 'Log.entryAdded' and about['entry']['level'] == 'error':
            self.errors.append(about['entry']['text'])
        if kind == 'Network.requestWillBeSent': self.asked.append(about['request']['url'])

    def resize(self, width, height):
        "A screen of this size; a narrow one is a phone's"
        self('Emulation.setDeviceMetricsOverride', width=width, height=height,
             deviceScaleFactor=1, mobile=width < 600)

    def js(self, code):
        "The value of an expression, or of a promise"
        said = self('Runtime.evaluate', expression=code, awaitPromise=True, returnByValue=True)
        assert 'exceptionDetails' not in said, said['exceptionDetails']
        return said['result'].get('value')

    def until(self, code, seconds=20, every=.02):
        "Wait until an expression is true, which is looked at so often"
        end = time.monotonic() + seconds
        while not (value := self.js(code)):
            assert time.monotonic() < end, f'never: {code}'
            time.sleep(every)
        return value

    def open(self, url, ready):
        self('Page.navigate', url=url)
        return self.until(ready)

    def key(self, name, code, text=''):
        how = dict(key=name, code=name, windowsVirtualKeyCode=code)
        self('Input.dispatchKeyEvent', type='keyDown', text=text, **how)
        self('Input.dispatchKeyEvent', type='keyUp', **how)

    def type(self, text): self('Input.insertText', text=text)

    def move(self, x, y): self('Input.dispatchMouseEvent', type='mouseMoved', x=x, y=y)

    def click(self, selector):
        x, y = self.js(f'''(() => {{ const r = document.querySelector({selector!r})
            .getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2] }})()''')
        self.move(x, y)
        for kind in ('mousePressed', 'mouseReleased'):
            self('Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', clickCount=1)

    def picture(self, path): path.write_bytes(b64decode(self('Page.captureScreenshot')['data']))

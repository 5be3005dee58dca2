"""A notebook of the gallery in a real JupyterLab, in a headless browser, far from the checkout.

Needs what `pip install -e '.[dev,slow]'` brings, and Chromium with its driver (Debian: apt install chromium-driver).
"""
import base64, importlib.util, json, os, shutil, socket, subprocess, sys, time, urllib.request

import pytest

import keep

pytestmark = pytest.mark.slow
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
MISSING = [name for name, found in dict(
    jupyterlab=importlib.util.find_spec("jupyterlab"), selenium=importlib.util.find_spec("selenium"),
    Chromium=CHROMIUM, chromedriver=DRIVER).items() if not found]
NOTEBOOK = "claims"  # draws records, and trains nothing
SETTINGS = {"notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are drawn, too
            "apputils-extension/notification": {"fetchNews": "false"}}

# Of the notebook that is open: for each code cell its number, and its outputs.
CELLS = """
return window.jupyterapp.shell.currentWidget.content.widgets.filter(cell => cell.model.type === 'code').map(
    cell => ({count: cell.model.executionCount, outputs: cell.model.outputs.toJSON()}))
"""
DRAWN = "return [...document.querySelectorAll('.jp-OutputArea img')].map(image => image.naturalWidth)"


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for(what, look, seconds=keep.HANGS):
    "What `look()` returns as soon as that is something."
    end = time.time() + seconds
    while time.time() < end:
        if found := look(): return found
        time.sleep(.5)
    raise TimeoutError(f"no {what} after {seconds} seconds")


def cleared(path):
    "The notebook without outputs, so that what is seen later has been computed."
    nb = json.loads(path.read_text(encoding="utf-8"))
    for cell in nb["cells"]:
        if cell["cell_type"] == "code": cell["outputs"] = []
    return json.dumps(nb)


@pytest.fixture
def lab(tmp_path):
    "The address of a JupyterLab that has one notebook and nothing else."
    if MISSING: pytest.skip(f"not installed: {', '.join(MISSING)}")
    folder, port = tmp_path / "notebooks", free_port()
    folder.mkdir()
    path = next(path for path in keep.notebooks() if path.stem == NOTEBOOK)
    (folder / path.name).write_text(cleared(path), encoding="utf-8")
    for name, value in SETTINGS.items():
        settings = tmp_path / f"settings/@jupyterlab/{name}.jupyterlab-settings"
        settings.parent.mkdir(parents=True)
        settings.write_text(json.dumps(value))
    own = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    own |= dict(JUPYTERLAB_SETTINGS_DIR=str(tmp_path / "settings"), JUPYTERLAB_WORKSPACES_DIR=str(tmp_path / "spaces"))
    own |= dict(EFCN_NB_RUNS=str(tmp_path / "runs"), PYTHONPATH=str(keep.ROOT), PYTHONDONTWRITEBYTECODE="1")
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--expose-app-in-browser",
               "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}", "--ServerApp.port_retries=0",
               f"--ServerApp.root_dir={folder}", "--IdentityProvider.token=", "--LabApp.news_url=None",
               "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    address = f"http://127.0.0.1:{port}"
    with open(tmp_path / "lab.log", "w") as log:
        server = subprocess.Popen(command, env={**os.environ, **own}, cwd=folder, stdout=log, stderr=log)
    try:
        wait_for("JupyterLab", lambda: server.poll() is not None or answers(address))
        assert server.poll() is None, (tmp_path / "lab.log").read_text()
        yield address
    finally:
        server.terminate()
        server.wait()


def answers(address):
    try: return urllib.request.urlopen(f"{address}/api/status").status == 200
    except OSError: return False


@pytest.fixture
def browser(tmp_path):
    if MISSING: pytest.skip(f"not installed: {', '.join(MISSING)}")
    from selenium import webdriver
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for option in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1200,1600",
                   f"user-data-dir={tmp_path / 'chromium'}"): options.add_argument(f"--{option}")
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_a_gallery_notebook_opens_runs_and_shows_its_figures(lab, browser, tmp_path):
    browser.get(f"{lab}/lab/tree/{NOTEBOOK}.ipynb?reset")
    ready = """const panel = window.jupyterapp && window.jupyterapp.shell.currentWidget, kernel = panel &&
               panel.sessionContext && panel.sessionContext.session && panel.sessionContext.session.kernel;
               return Boolean(kernel && kernel.status === 'idle')"""
    wait_for("kernel", lambda: browser.execute_script(ready))
    assert not any(cell["outputs"] for cell in browser.execute_script(CELLS))
    browser.execute_script("window.jupyterapp.commands.execute('runmenu:run-all')")
    done = lambda: all(cell["count"] for cell in browser.execute_script(CELLS))
    failed = lambda: [output for cell in browser.execute_script(CELLS) for output in cell["outputs"]
                      if output["output_type"] == "error"]
    wait_for("end", lambda: done() or failed())
    assert not failed()
    found = [kind for cell in browser.execute_script(CELLS) for output in cell["outputs"]
             for kind in output.get("data", {})]
    saved = [kind for path in keep.notebooks() if path.stem == NOTEBOOK for cell in keep.code_cells(keep.read_nb(path))
             for output in cell.outputs for kind in output.get("data", {})]
    assert found.count("image/png") == saved.count("image/png") > 0
    assert found.count("text/html") > 0, "tables are tables"
    widths = wait_for("figures", lambda: browser.execute_script(DRAWN))
    assert len(widths) == found.count("image/png") and min(widths) > 100
    picture = tmp_path / "lab.png"
    picture.write_bytes(base64.b64decode(browser.get_screenshot_as_base64()))
    assert picture.stat().st_size > 20_000
    assert [file.name for file in (tmp_path / "notebooks").iterdir() if file.name[0] != "."] == [f"{NOTEBOOK}.ipynb"]

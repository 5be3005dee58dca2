"What the test command does, said before it begins, and what came of it, by stage of the gate."
STAGES = {  # the stage of a file's tests; the library's own tests come last
    "test_keep": "tools of the notebooks", "test_export": "modules equal their notebooks", "test_names": "names",
    "test_imports": "imports between notebooks", "test_notebooks": "notebooks: clean, fresh, run",
    "test_prose": "notebooks: clean, fresh, run", "test_readme": "README", "test_package": "installed package",
    "test_docs": "documentation site"}
LIBRARY = "library: tests by subject"
KINDS = ("passed", "failed", "error", "skipped")


def pytest_report_header(config):
    return ("gate: compares the modules with the notebooks, checks names and imports, runs every notebook (the gallery "
            "at a small size),\n      tests README, an installed package, the library and the documentation site")


def stage(report): return STAGES.get(report.nodeid.split("::")[0].rpartition("/")[2].removesuffix(".py"), LIBRARY)


def lines(stats):
    "A line for each stage: how many tests passed, failed, were skipped, and how long they took, added up."
    counts, seconds = {}, {}
    for kind in KINDS:
        for report in stats.get(kind, []):
            name = stage(report)
            counts.setdefault(name, dict.fromkeys(KINDS, 0))[kind] += 1
    for reports in stats.values():
        for report in reports:
            if hasattr(report, "duration"): seconds[stage(report)] = seconds.get(stage(report), 0) + report.duration
    said = []
    for name in dict.fromkeys([*STAGES.values(), LIBRARY]):
        if name not in counts: continue
        parts = [f"{count} {kind}" for kind, count in counts[name].items() if count]
        said.append(f"{name:30} {', '.join(parts):36} {seconds[name]:7.0f} s")
    return said


def pytest_terminal_summary(terminalreporter):
    said = lines(terminalreporter.stats)
    if len(said) < 2: return
    terminalreporter.section("by stage (seconds of all processes)")
    for line in said: terminalreporter.write_line(line)

"Package metadata for pip, read from settings.ini."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

config = ConfigParser(delimiters=["="])
config.read("settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
name = cfg["lib_name"]
suffix = "_requirements"
repository = cfg.get("git_url", "").rstrip("/")
site = cfg.get("doc_host", "") and cfg["doc_host"].rstrip("/") + cfg["doc_baseurl"]


class WithoutIndex(build_py):
    "Leaves nbdev's index of symbols out of wheels: an installation in development mode (pip install -e) has it."
    def find_package_modules(self, package, folder):
        return [found for found in super().find_package_modules(package, folder) if found[1] != "_modidx"]


def long_description():
    "README as it reads off the repository: links to its files lead there; without an address, their text stays."
    file = Path("README.md")
    def image(match): return f"![{match[1]}]({repository}/raw/{cfg['branch']}/{match[2]})" if repository else ""
    def link(match): return f"[{match[1]}]({repository}/blob/{cfg['branch']}/{match[2]})" if repository else match[1]
    parts = re.split(r"(^```.*?^```)", file.read_text(encoding="utf-8") if file.exists() else "", flags=re.M | re.S)
    within = r"\]\((?![a-z]+:|#)([^)\s]+)\)"
    parts[::2] = [re.sub(r"(?<!!)\[([^\]]*)" + within, link, re.sub(r"!\[([^\]]*)" + within, image, part))
                  for part in parts[::2]]
    return "".join(parts)


setup(
    name=name,
    version=cfg["version"],
    description=cfg["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    url=repository or None,
    project_urls={label: address for label, address in {
        "Documentation": site, "Source": repository, "Issues": repository and f"{repository}/issues",
        "Changes": repository and f"{repository}/blob/{cfg['branch']}/CHANGELOG.md"}.items() if address},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Framework :: Jupyter",
        "Intended Audience :: Science/Research",
        "Intended Audience :: Developers",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        *(f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 15)),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed"],
    python_requires=f">={cfg['min_python']}",
    packages=find_packages(include=[name, f"{name}.*"]),
    package_data={name: ["py.typed", "*.pyi", *(f"records/**/*.{kind}" for kind in ("csv", "npz", "json", "txt"))]},
    cmdclass={"build_py": WithoutIndex},
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix(suffix): v.split() for k, v in cfg.items() if k.endswith(suffix)},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
)

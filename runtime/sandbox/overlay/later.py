"""Step "sandbox": which changes take effect later, outside of every sandbox, and why.

A commit copies files that somebody's shell, editor, build tool, CI or next agent will obey. None of
these names is forbidden; each is shown to whoever decides about the commit.
"""

from __future__ import annotations

from typing import Final

_SHELL: Final = "a shell reads it when it starts"
_PYTHON: Final = "Python runs it when it starts"
_TEST: Final = "the test runner runs it"
_BUILD: Final = "a build tool obeys it"
_PACKAGE: Final = "a package manager obeys it"
_CI: Final = "CI obeys it"
_AGENT: Final = "an agent obeys it"
_EDITOR: Final = "an editor obeys it"
_GIT: Final = "git obeys it"
_DEBUGGER: Final = "a debugger runs it when it starts"
_ENVIRONMENT: Final = "programs take their environment from it"
_SERVICE: Final = "the system or the desktop starts what it names"


def _each(why: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), why)


# Folded to lower case, as some file systems do.
_NAMES: Final = {
    **_each(
        _SHELL,
        ".bashrc .bash_profile .bash_login .bash_logout .bash_aliases .profile .zshrc .zshenv"
        " .zprofile .zlogin .zlogout .kshrc .cshrc .tcshrc .login .inputrc config.fish",
    ),
    **_each(_PYTHON, "sitecustomize.py usercustomize.py .pythonrc.py pyvenv.cfg"),
    **_each(
        _TEST,
        "conftest.py pytest.ini .pytest.ini tox.ini noxfile.py .coveragerc .mocharc.js .mocharc.cjs"
        " .mocharc.json .rspec karma.conf.js",
    ),
    **_each(
        _BUILD,
        "makefile gnumakefile cmakelists.txt cmakepresets.json build.rs build.gradle"
        " build.gradle.kts settings.gradle settings.gradle.kts gradle.properties pom.xml build.xml"
        " meson.build build.ninja wscript sconstruct configure.ac rakefile justfile .justfile"
        " taskfile.yml taskfile.yaml dockerfile containerfile docker-compose.yml"
        " docker-compose.yaml compose.yml compose.yaml vagrantfile tiltfile"
        " module.bazel .bazelrc go.work rust-toolchain rust-toolchain.toml flake.nix default.nix"
        " shell.nix tsconfig.json mix.exs build.sbt dune-project build.zig directory.build.props"
        " directory.build.targets .eslintrc.js .eslintrc.cjs .babelrc.js .prettierrc.js"
        " .pre-commit-config.yaml .pre-commit-hooks.yaml lefthook.yml .lefthook.yml"
        " .lintstagedrc .lintstagedrc.js gruntfile.js gulpfile.js",
    ),
    **_each(
        _PACKAGE,
        "package.json package-lock.json npm-shrinkwrap.json yarn.lock pnpm-lock.yaml"
        " pnpm-workspace.yaml .npmrc .yarnrc .yarnrc.yml .pnpmfile.cjs bunfig.toml setup.py"
        " setup.cfg pyproject.toml requirements.txt pip.conf .pypirc uv.toml uv.lock poetry.lock"
        " pipfile pipfile.lock gemfile gemfile.lock composer.json cargo.toml cargo.lock go.mod"
        " go.sum nuget.config deno.json deno.jsonc",
    ),
    **_each(
        _CI,
        ".gitlab-ci.yml .travis.yml azure-pipelines.yml bitbucket-pipelines.yml .drone.yml"
        " .drone.star .woodpecker.yml .woodpecker.yaml jenkinsfile appveyor.yml .appveyor.yml"
        " .cirrus.yml .cirrus.star cloudbuild.yaml buildspec.yml codecov.yml renovate.json"
        " .pre-commit-ci.yaml netlify.toml vercel.json fly.toml procfile",
    ),
    **_each(
        _AGENT,
        "agents.md claude.md claude.local.md gemini.md skill.md .aider.conf.yml .clinerules"
        " .windsurfrules .roomodes .goosehints copilot-instructions.md .mcp.json mcp.json",
    ),
    **_each(_EDITOR, ".vimrc .exrc .gvimrc .nvimrc .nvim.lua .dir-locals.el .emacs"),
    **_each(_GIT, ".gitattributes .gitmodules .gitconfig .git-blame-ignore-revs"),
    **_each(_DEBUGGER, ".gdbinit .lldbinit"),
    **_each(_ENVIRONMENT, ".envrc .tool-versions .mise.toml mise.toml .flaskenv"),
    **_each(_SERVICE, "crontab authorized_keys"),
}
_FOLDERS: Final = {
    **_each(
        _CI,
        ".github .gitlab .circleci .buildkite .woodpecker .teamcity .forgejo .gitea .builds"
        " .semaphore .tekton .azure-pipelines",
    ),
    **_each(
        _AGENT,
        ".roo .continue .kiro .amazonq .clinerules .opencode .goose .agents .claude .codex"
        " .gemini .cursor .windsurf",
    ),
    **_each(_EDITOR, ".fleet .nova .vscode .idea .zed .vim .emacs.d .theia"),
    **_each(_BUILD, ".mvn .cargo .yarn .bundle .gradle"),
    **_each(_SERVICE, "autostart systemd .ssh cron.d init.d"),
    **_each("git may run it as a hook", "hooks .githooks .husky .lefthook"),
    "node_modules": "programs load it as code",
    "site-packages": "programs load it as code",
}
_SUFFIXES: Final = {
    ".pth": _PYTHON,
    ".pyc": "Python may run it instead of the source beside it",
    **dict.fromkeys((".so", ".dylib", ".dll", ".pyd", ".node", ".jar"), "programs load it as code"),
    **dict.fromkeys((".mk", ".cmake", ".gradle", ".bzl", ".gemspec", ".csproj"), _BUILD),
    **dict.fromkeys((".service", ".timer", ".socket", ".desktop", ".plist"), _SERVICE),
    **dict.fromkeys((".code-workspace", ".sublime-project"), _EDITOR),
    **dict.fromkeys((".mdc", ".instructions.md", ".prompt.md"), _AGENT),
    **dict.fromkeys(
        (".config.js", ".config.cjs", ".config.mjs", ".config.ts", ".config.mts"), _BUILD
    ),
}


def reason(path: str) -> str | None:
    """Say why a change of this name takes effect later, or None."""
    *folders, name = path.lower().split("/")
    if ".git" in folders:
        return None  # its history; everything else there is refused (names.py)
    if name in _NAMES:
        return _NAMES[name]
    if name == ".env" or name.startswith(".env."):
        return _ENVIRONMENT
    if name.startswith("dockerfile."):
        return _BUILD
    if name == "head":
        return "it may make this folder a git repository with a config of its own"
    for folder in (*folders, name):
        if folder in _FOLDERS:
            return _FOLDERS[folder]
    return next((why for suffix, why in _SUFFIXES.items() if name.endswith(suffix)), None)

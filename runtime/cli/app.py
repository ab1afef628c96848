"""The command tree: which verbs there are and where each one lives.

Only the verb that is named is imported, so that `trace verify` never loads the runtime. All
others appear in `--help` by the summary that stands here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Annotated, NoReturn

import typer
from typer.main import get_command

from safeconduct.errors import Exit

from .terminal import tell

# For verbs that run another program: whatever follows the first plain argument is its own.
PASS_THROUGH: Mapping[str, object] = {"allow_interspersed_args": False}


@dataclass(frozen=True, slots=True)
class Verb:
    """One verb: its function as ``module:function`` in this folder, and what it is for."""

    target: str
    summary: str
    settings: Mapping[str, object] = field(default_factory=dict[str, object])

    def load(self) -> Callable[..., int]:
        """Import the verb."""
        module, _, function = self.target.partition(":")
        loaded: Callable[..., int] = getattr(import_module(f".{module}", __package__), function)
        return loaded


GROUPS = {
    "policy": "Check, test, compare and explain policies.",
    "trace": "List, read and verify traces.",
    "keys": "Show, make and rotate log keys.",
    "changes": "Look at what overlays hold, then commit it or roll it back.",
}
VERBS: Mapping[str, Verb] = {
    "init": Verb("init:init", "Write a first policy for a project."),
    "exec": Verb("execute:execute", "Run one program, judged and confined.", PASS_THROUGH),
    "run": Verb("run:run", "Run a whole program, such as an agent, as one call.", PASS_THROUGH),
    "mcp": Verb("mcp:mcp", "Put a confined MCP server behind the policy.", PASS_THROUGH),
    "call": Verb("call:call", "Run one call of a tool."),
    "policy check": Verb("policy_check:check", "Say what is wrong or doubtful about a policy."),
    "policy explain": Verb("policy_explain:explain_call", "Say how a call is judged, and why."),
    "policy test": Verb("policy_test:run_tests", "Judge the calls of a policy's own test file."),
    "policy simulate": Verb(
        "policy_simulate:simulate", "Judge the calls of a trace again by the policy that counts."
    ),
    "policy diff": Verb("policy_diff:diff", "Say where a new policy is wider than the old one."),
    "policy schema": Verb("policy_schema:schema", "Print the JSON Schema of policy files."),
    "trust": Verb("trust:trust", "Believe a policy that came with a project."),
    "trace ls": Verb("trace_ls:list_traces", "List your traces."),
    "trace show": Verb("trace_show:show", "Tell what a trace recorded."),
    "trace verify": Verb("trace_verify:verify", "Verify a trace with a key you bring."),
    "trace prove": Verb("trace_prove:prove", "Prove that one entry is in the signed log."),
    "trace verify-proof": Verb(
        "trace_verify_proof:verify_proof", "Check a proof, a session bundle or a statement."
    ),
    "trace export": Verb("trace_export:export", "Hand a trace on, or one session of it."),
    "trace erase": Verb("trace_erase:erase", "Destroy what a session can be opened with."),
    "replay": Verb("replay:replay", "Judge recorded calls again by another policy."),
    "keys show": Verb("keys:show", "Print the public line of your log key."),
    "keys new": Verb("keys:new", "Make a log key in a new file."),
    "keys rotate": Verb("keys:rotate", "Hand over to a new log key and destroy the old one."),
    "keys unlock": Verb("keys:unlock", "Keep your log key's passphrase for a while."),
    "keys lock": Verb("keys:lock", "Forget your log key's passphrase."),
    "witness": Verb("witness:witness", "Cosign the logs of others, so that none is forked."),
    "changes ls": Verb("changes:list_changes", "List changes that wait for a decision."),
    "changes diff": Verb("changes:diff", "Show what a set of changes does."),
    "changes commit": Verb("changes:commit_changes", "Apply a set of changes to its workspace."),
    "changes rollback": Verb("changes:rollback", "Forget a set of changes."),
    "doctor": Verb("doctor:doctor", "Say what this machine can enforce, and how to get more."),
    "setup": Verb("setup:setup", "Show, and with root do, the one step that gives more here."),
}


def dispatch(arguments: Sequence[str]) -> int:
    """Run the verb that ``arguments`` name; usage errors become exit 2."""
    chosen = _chosen(arguments)
    command = get_command(_tree(chosen))
    try:
        # Not command.main(): it would turn a closed pipe into exit code 1, which means our bug.
        with command.make_context("safeconduct", list(arguments) or ["--help"]) as context:
            result = command.invoke(context)
    except typer.Exit as leaving:
        return leaving.exit_code
    except typer.TyperException as error:
        where = f"safeconduct {chosen}".rstrip()
        # A group without a verb comes with its whole help text instead of a message.
        tell(error.format_message().partition("\n")[0], f"see: {where} --help")
        return Exit.USAGE
    except typer.Abort:
        return Exit.SIGNAL + 2
    return result if isinstance(result, int) else Exit.OK


def _chosen(arguments: Sequence[str]) -> str:
    """Return the verb, or the group, that the first words name; empty if they name none."""
    for count in (2, 1):
        words = " ".join(arguments[:count])
        if words in VERBS or words in GROUPS:
            return words
    return ""


def _tree(chosen: str) -> typer.Typer:
    app = _group("safeconduct", "Judge, confine and record every tool call of an AI agent.")
    app.callback()(_root)
    groups: dict[str, typer.Typer] = {}
    for name, summary in GROUPS.items():
        groups[name] = _group(name, summary)
        # Without a callback typer would fold a group of one verb into that verb.
        groups[name].callback()(_nothing)
    added: set[str] = set()
    for words, verb in VERBS.items():
        first, _, second = words.partition(" ")
        parent = groups[first] if second else app
        if second and first not in added:
            app.add_typer(parent, name=first)
            added.add(first)
        function = verb.load() if words == chosen else _not_loaded
        parent.command(
            second or first, short_help=verb.summary, context_settings=dict(verb.settings)
        )(function)
    return app


def _group(name: str, summary: str) -> typer.Typer:
    return typer.Typer(
        name=name,
        help=summary,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )


def _print_version(wanted: bool) -> None:
    if wanted:
        from safeconduct import __version__

        print(f"safeconduct {__version__}")
        raise typer.Exit(Exit.OK)


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Judge, confine and record every tool call of an AI agent."""


def _nothing() -> None:
    pass


def _not_loaded() -> NoReturn:
    """Stand for a verb in `--help`. Reached only where something precedes the verb."""
    raise typer.TyperException("The verb comes first.")

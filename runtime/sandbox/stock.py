"""Step "sandbox": sandboxes in stock, bound to the folders of a kind of calls or to none yet.

Calls alike share a template. The first of a kind takes a sandbox that was made without folders, for
any call with its limits, and has its own attached: sooner there than a template of its own.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Protocol

from safeconduct.call import Profile, Tier

from .cgroup import Cgroups
from .channel import encode
from .launcher import Launcher
from .layout import Layout, lay_out, lay_out_base, lay_out_grants
from .plan import Plan, Setting, identity
from .pool import Pool, Pools
from .shield import Shield
from .template import Template, Waiting

# LIMIT: settings that are remembered.
_SETTINGS_MAX = 64
# How long the launcher may take to clone the mounts of one call.
_CLONE_SECONDS = 20.0


class Planner(Protocol):
    """Says what a template is made of."""

    def plan(
        self, profile: Profile, layout: Layout, ids: Mapping[str, object], *, explain: bool = False
    ) -> Plan:
        """Return the plan of a profile's template."""
        ...

    def program(self, profile: Profile, *, explain: bool = False) -> bytes:
        """Return its seccomp filter."""
        ...


class Stock:
    """The templates and waiting sandboxes of one tier. Safe to use from several threads."""

    def __init__(
        self,
        launcher: Launcher,
        tier: Tier,
        planner: Planner,
        *,
        cgroups: Cgroups | None,
        ahead: int,
    ) -> None:
        self._launcher, self._tier, self._planner = launcher, tier, planner
        self._cgroups = cgroups
        self.pools = Pools(ahead=ahead)
        # Each holds the objects whose identity names it.
        self._settings: dict[Hashable, Setting] = {}

    def setting(
        self, profile: Profile, workspace: str, shield: Shield, cwd: str, *, explain: bool
    ) -> Setting:
        """Return what a template for such a call depends on."""
        # By identity: comparing what they hold would take longer than making it anew.
        alike = id(profile), id(shield), workspace, cwd, explain
        found = self._settings.get(alike)
        if found is None:
            if len(self._settings) >= _SETTINGS_MAX:
                self._settings.clear()
            found = self._settings[alike] = Setting(
                profile=profile,
                workspace=workspace,
                shield=shield,
                cwd=cwd,
                explain=explain,
                tier=self._tier,
            )
        return found

    def reserve(self, setting: Setting, *, late: bool) -> tuple[Pool, bool]:
        """Return a pool, and whether the profile's folders still have to be attached."""
        pool = None if late else self.pools.find(setting.key)
        if pool is not None:
            return pool, False
        if setting.can_be_late(self._tier) and (late or self.pools.has(setting.base_key)):
            return self._unbound(setting), True
        return self._bound(setting), False

    def prepare(self, setting: Setting) -> None:
        """Have sandboxes made for the next calls alike. Does not wait."""
        self._bound(setting).give_back()

    def prepare_first(self, profile: Profile) -> None:
        """Have sandboxes made for first calls with the limits of ``profile``. Does not wait."""
        setting = Setting(profile=profile, workspace="/", shield=Shield(), cwd="/")
        if setting.can_be_late(self._tier):
            self._unbound(setting).give_back()

    def bind(self, waiting: Waiting, setting: Setting) -> None:
        """Attach the folders of one call to a sandbox that was made without any."""
        ids, mapped = identity(setting.workspace, self._tier)
        ids |= {"uid": waiting.uid, "gid": waiting.uid if mapped else ids["gid"]}
        grants = lay_out_grants(
            setting.profile, cwd=setting.cwd, shield=setting.shield, mapped=mapped
        )
        binds = [mount for mount in grants.mounts if mount["kind"] == "bind"]
        trees = self._launcher.clone(ids, binds, _CLONE_SECONDS) if binds else []
        try:
            bind = encode({"mounts": grants.mounts, "landlock": grants.landlock})
            waiting.channel.tell(bind, trees)
        finally:
            for tree in trees:
                os.close(tree)

    def close(self) -> None:
        """End every sandbox that waits."""
        self.pools.close()

    def _bound(self, setting: Setting) -> Pool:
        return self.pools.reserve(setting.key, lambda: self._template(setting), ahead=setting.ready)

    def _unbound(self, setting: Setting) -> Pool:
        return self.pools.reserve(setting.base_key, lambda: self._base(setting.profile))

    def _template(self, setting: Setting) -> Template:
        profile, explain = setting.profile, setting.explain
        ids, mapped = identity(setting.workspace, self._tier)
        layout = lay_out(profile, self._tier, cwd=setting.cwd, shield=setting.shield, mapped=mapped)
        plan = self._planner.plan(profile, layout, ids, explain=explain)
        return self._make(plan, self._planner.program(profile, explain=explain))

    def _base(self, profile: Profile) -> Template:
        ids, _ = identity(None, self._tier)
        plan = replace(self._planner.plan(profile, lay_out_base(profile), ids), late=True)
        return self._make(plan, self._planner.program(profile))

    def _make(self, plan: Plan, program: bytes) -> Template:
        template = self._launcher.template(self._tier, asdict(plan), program)
        if self._cgroups is not None:
            template.closed = partial(self._cgroups.retire_made, plan.name)
        return template

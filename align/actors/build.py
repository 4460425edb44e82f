"""The `Backend` of a real run: Ray actors for trainers, engines and rewards, Ray tasks for work on model files."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray

from align.actors import files
from align.actors.cluster import Cluster, answer
from align.actors.places import Places, environment_of
from align.actors.policy import PolicyActor, RayTrainer, load_libraries
from align.actors.reference import ReferenceActor
from align.actors.reward_actors import RayScorer
from align.actors.spare import Spare
from align.engines import SHARE_OF_GPU
from align.episodes.describe import describe
from align.episodes.setting import schema_tokens
from align.hub import resolve_model_folder
from align.losses import names as loss_names
from align.protocols.fleet import Fleet
from align.protocols.scorer import Scorer
from align.recipe.adapter import Adapter
from align.recipe.chat_files import ChatFiles, read_settings
from align.recipe.engines import facts_of
from align.recipe.environment import Environment
from align.recipe.inputs import Model
from align.recipe.parts import ReferencePath, Rollout
from align.recipe.placement import Placement
from align.recipe.support import publish_mode
from align.stages import processes
from align.stages.backend import FleetJob, Needs, ScorerJob, TrainerJob
from align.stages.processes import ProcessId
from align.stages.roles import Role, roles_of, scorer_names, trainer_names
from align.stages.stage_start import adapter_in
from align.train.spec import TrainerSpec, reference_spec
from rollout.base import EngineSpec
from rollout.fleet import RayFleet
from rollout.member import Limits
from rollout.worker import engine_actor


class RayBackend:
    """See `align.stages.backend.Backend`.

    token: a file of the run folder that every node must see. threads: counts by role to use instead of the machine's
    (those a resumed run began with: results depend on them in the last bit). sampling: see `roles_of`.
    """

    def __init__(
        self,
        cluster: Cluster,
        placement: Placement,
        token: Path,
        threads: Mapping[str, int],
        sampling: int | None = None,
    ):
        self.cluster, self.placement, self.token, self.sampling = cluster, placement, token, sampling
        self._threads = dict(threads)
        self._places: Places | None = None
        self._spare_trainer, self._spare_engine = Spare(), Spare()
        self._held: set[Needs] = set()  # what the cluster had room for: if it has not, a node was lost

    # ------------------------------------------------------------------------------------------------- placement

    @asynccontextmanager
    async def places(self, needs: Needs) -> AsyncIterator[None]:
        again = needs in self._held
        self._places = await Places.reserve(self.roles(needs), self.replacement_s if again else None)
        self._held.add(needs)
        try:
            yield
        finally:
            self._places.release()
            self._places = None

    def roles(self, needs: Needs) -> list[Role]:
        """Bundles of a stage on this cluster; the threads they get are kept for `threads`."""
        total = self.cluster.total("GPU")
        cores = self.cluster.cores
        roles = roles_of(needs, self.placement, cores=cores, gpus=total, threads=self._threads, sampling=self.sampling)
        self._threads |= {role.kind: role.threads for role in roles}
        return roles

    def threads(self) -> Mapping[str, int]:
        return dict(self._threads)

    def processes(self) -> list[ProcessId]:
        return processes.descendants("ray") if self.cluster.local else []

    @property
    def replacement_s(self) -> float:
        """Seconds that a lost engine or reward actor may be without a process: on one machine, no node will join."""
        return Limits().place if self.cluster.local else self.placement.replacement_s

    @property
    def _now(self) -> Places:
        assert self._places is not None, "actors are made inside `places`"
        return self._places

    # ------------------------------------------------------------------------------------------------- actors

    def expect(self, needs: Needs, engine: str | None = None) -> None:
        if not self._can_spare:
            return
        roles = {role.name: role for role in self.roles(needs)}
        if trainer := roles.get("trainer"):
            environment = environment_of(trainer)
            self._spare_trainer.expect(environment, lambda: _loading_trainer(environment))
        if engine is not None and (role := roles.get("rollout-0")):
            kind = (engine, role.threads, role.passive)
            self._spare_engine.expect(kind, lambda: _loading_engine(*kind))

    @property
    def _can_spare(self) -> bool:
        return self.cluster.local and not self.gpus() and self.placement.trainer.ranks == 1

    async def trainer(self, job: TrainerJob) -> RayTrainer:
        spec = self._trainer_spec(job)
        reference = None
        if isinstance(job.reference, ReferencePath):
            reference = await self._reference(job, job.reference, spec)
        names = trainer_names(self.placement.trainer.ranks)
        again = _is_ours(job)
        spare = self._spare_trainer.take(environment_of(self._now.roles[names[0]]), back=again)
        leave = self._spare_trainer.put if spare and again else None
        actors = [spare] if spare else [ray.remote(PolicyActor).options(**self._now.at(n)).remote() for n in names]
        # NCCL wants a GPU for each rank; ranks that share one send their gradients through the CPU
        wire = "cuda" if self._now.roles["trainer"].gpus >= 1 else "cpu"
        trainer = RayTrainer(actors, job.stage_id, reference, wire, leave)
        await trainer.start(spec, self.token)
        return trainer

    def _trainer_spec(self, job: TrainerJob) -> TrainerSpec:
        gpu = self._now.roles["trainer"].gpus > 0
        rollout = job.rollout
        return TrainerSpec(
            model=job.model,
            base=str(job.start.base),
            adapter_config=job.start.config,
            losses=job.losses,
            optim=job.optim,
            rates=job.rates,
            total_updates=job.total,
            adapter=str(job.start.adapter) if job.start.adapter else None,
            max_tokens=job.packing.budget(gpu),
            max_patches=job.packing.patches(gpu),
            media_cache_mb=job.packing.media_cache_mb,
            temperature=rollout.temperature if rollout else 1.0,
            reference="path" if isinstance(job.reference, ReferencePath) else job.reference,
            publish=publish_mode(job.start.config, rollout) if rollout else "adapter",
            engine_dtype=engine_dtype(job.model, rollout, gpu) if rollout else "float32",
            seed=job.seed,
            threads=self._now.threads("trainer"),
            device="cuda" if gpu else "cpu",
            trainable=job.trainable,
            labels=job.labels,
            chat=job.chat,
            sharding=self.placement.trainer.strategy,
        )

    async def _reference(self, job: TrainerJob, path: ReferencePath, policy: TrainerSpec) -> Any:
        base = await asyncio.to_thread(resolve_model_folder, path.path, path.revision)
        adapter = await asyncio.to_thread(resolve_model_folder, path.adapter) if path.adapter else None
        spec = replace(
            reference_spec(policy, base, adapter, adapter_in(adapter) if adapter else Adapter()),
            threads=self._now.threads("reference"),
            device="cuda" if self._now.roles["reference"].gpus > 0 else "cpu",
        )
        actor = ray.remote(ReferenceActor).options(**self._now.at("reference")).remote()
        try:
            await answer(actor.start.remote(spec, self.token), f"the reference of stage {job.stage_id!r}")
        except BaseException:
            ray.kill(actor)
            raise
        return actor

    async def fleet(self, job: FleetJob) -> Fleet:
        role = self._now.roles["rollout-0"]
        rollout = job.rollout
        options = dict(rollout.engine)
        share = facts_of(rollout.name).share
        if share is not None and 0 < role.gpus < 1:
            options.setdefault(share, round(SHARE_OF_GPU * role.gpus, 3))
        spec = EngineSpec(
            name=rollout.name,
            folder=str(job.base),
            dtype=engine_dtype(job.model, rollout, role.gpus > 0),
            group_size=job.group_size,
            max_tokens=rollout.max_tokens,
            max_model_len=rollout.max_model_len or context_length(job),
            lora_rank=job.adapter_rank,
            versions=job.versions,
            in_flight=rollout.publish == "in_flight",
            seed=job.seed,
            threads=role.threads,
            passive=role.passive,
            temperature=rollout.temperature,
            stop=rollout.stop,
            end_ids=job.end_ids,
            trust_remote_code=job.model.trust_remote_code,
            media=job.media,
            pixels=job.pixels,
            engine=options,
            environment=job.environment,
        )
        group, bundles = self._now.group_of([f"rollout-{number}" for number in range(rollout.workers)])
        fleet = RayFleet(
            spec,
            rollout.workers,
            cpus=role.cpus,
            gpus=role.gpus,
            placement_group=group,
            bundles=bundles,
            limits=Limits(place=self.replacement_s, heartbeat=rollout.heartbeat_s, request=rollout.request_timeout_s),
            token=self.token,
            ready=self._spare_engine.take((rollout.name, role.threads, role.passive)),
        )
        try:
            await fleet.ready()
        except BaseException:
            await fleet.close()
            raise
        return fleet

    async def describe_environment(self, rules: Environment, folder: Path) -> Mapping[str, Any]:
        return await describe(rules, folder)

    async def scorer(self, job: ScorerJob) -> Scorer:
        names = scorer_names(job.number, self.placement.rewards.count)
        scorer = RayScorer(
            job.rewards,
            job.folder,
            seed=job.seed,
            placements=[self._now.at(name) for name in names],
            log_folder=job.logs,
            cache=job.cache,
            token=self.token,
            replacement_s=self.replacement_s,
        )
        try:
            await scorer.start()
        except BaseException:
            await scorer.close()
            raise
        return scorer

    # ------------------------------------------------------------------------------------------------- model files

    async def _task(self, function: Any, who: str, *arguments: Any) -> Any:
        """By a trainer's process that waits for its stage, where there is one: it has loaded torch, or will."""
        spare = self._spare_trainer.actor
        if spare is not None:
            return await answer(spare.do.remote(function, self.token, *arguments), who)
        async with self.places(Needs(files=True)):
            task = ray.remote(function).options(**self._now.at("files"), max_retries=0)
            return await answer(task.remote(self.token, *arguments), who)

    def gpus(self) -> float:
        return self.cluster.total("GPU")

    async def multiplied(self, inner: int, outer: int) -> Mapping[str, float]:
        [role] = self.roles(Needs(files=True))
        found: Mapping[str, float] = await self._task(
            files.multiplied, "measuring the machine", inner, outer, role.threads
        )
        return found

    async def write_base(self, model: Model, folder: Path, seed: int) -> None:
        await self._task(files.write_base, "writing the model from scratch", model, folder, seed)

    async def merge(
        self, base: Path, adapter: Path, out: Path, *, dtype: str, seed: int, chat: ChatFiles
    ) -> Mapping[str, Any]:
        report: Mapping[str, Any] = await self._task(files.merge, "the merge", base, adapter, out, dtype, seed, chat)
        return report

    async def export(self, folder: Path, out: Path, *, format: str, dtype: str) -> Mapping[str, Any]:
        report: Mapping[str, Any] = await self._task(files.export, "the export", folder, out, format, dtype)
        return report

    async def close(self) -> None:
        self._spare_trainer.close()
        self._spare_engine.close()
        self.cluster.close()


def _is_ours(job: TrainerJob) -> bool:
    """Whether nothing of a user's runs in this trainer's process: what their code leaves there would be met by the next
    stage's."""
    return not job.model.trust_remote_code and all(term.name in loss_names() for term in job.losses)


def _loading_trainer(environment: dict[str, Any]) -> Any:
    actor: Any = ray.remote(PolicyActor).options(num_cpus=0, runtime_env=environment).remote()
    actor.do.remote(load_libraries)  # what fails here fails again, with words, when the trainer starts
    return actor


def _loading_engine(name: str, threads: int, passive: bool) -> Any:
    actor = engine_actor(threads, passive, num_cpus=0)
    actor.load.remote(name)
    return actor


def context_length(job: FleetJob) -> int:
    """Tokens that an engine must hold: the longest prompt and what may follow it, as far as the model goes."""
    if job.environment is None:
        return job.longest_prompt + job.rollout.max_tokens
    config = read_settings(job.base / "config.json")
    positions = (config.get("text_config") or config).get("max_position_embeddings")
    spec = job.environment
    turn = job.rollout.max_tokens
    wanted = max(
        world.longest + schema_tokens(world, spec.tokenizer) + world.rules.context_tokens(turn)
        for world in spec.worlds
        if world.longest
    )
    return min(wanted, int(positions)) if positions else wanted


def engine_dtype(model: Model, rollout: Rollout | None, gpu: bool) -> str:
    """The dtype an engine computes in: as `rollout.dtype` says, else the model's, else the device's usual one."""
    for name in (rollout.dtype if rollout else "auto", model.dtype):
        if name != "auto":
            return name
    return "bfloat16" if gpu else "float32"

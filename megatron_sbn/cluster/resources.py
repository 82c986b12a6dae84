"""How many ranks a job starts on each node, and the GPUs and CPUs that it asks Slurm for; chosen where nobody did.

Where a node's GPUs are known (SBN_GPUS_PER_NODE of env.sh, sbatch's options, sinfo) and the recipe may use them: one
rank a GPU. Else one replica of the model over the nodes. Imports no torch.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sbn.cluster.site import Nodes, Site, gpus_in
from megatron_sbn.config import Recipe
from megatron_sbn.config.validation import min_world_size, validate_world_size
from megatron_sbn.errors import RecipeError
from megatron_sbn.plan.shapes import model_parameters
from megatron_sbn.text_table import count_text

LARGE = 100_000_000  # parameters that nobody trains on CPUs by intention
GPU_RANK_CPUS, CPU_RANK_CPUS = 8, 4
_NAMES_GPUS = re.compile(r"(?:^| )(?:--gpus\S*|-G ?\S+|--gres[= ]\S*gpu\S*|--tres-per-\w+[= ]\S*gpu\S*)")
_A_NODE = re.compile(r"(?:^| )--gpus-per-node[= ](?:[A-Za-z][\w.-]*:)?(\d+)")
_OF_GRES = re.compile(r"(?:^| )--gres[= ](\S+)")
_NAMES_CPUS = re.compile(r"(?:^| )(?:--cpus-per-(?:task|gpu)\b|-c ?\d|--exclusive\b)")


@dataclass(frozen=True)
class Place:
    """Where a job will run, as far as it is known: env.sh, the nodes, and the options of this submission."""

    site: Site
    nodes: Nodes | None
    options: tuple[str, ...] = ()

    @property
    def words(self) -> str:
        """All that sbatch is told."""
        return " ".join([*self.site.options, *self.options])

    @property
    def names_gpus(self) -> bool:
        """Whether sbatch's options ask for GPUs already."""
        return _NAMES_GPUS.search(self.words) is not None

    @property
    def gpus(self) -> int:
        """Of a node, as far as they are known; else 0."""
        named = [int(number) for number in _A_NODE.findall(self.words)]
        named += [gpus_in(text)[0] for text in _OF_GRES.findall(self.words)]
        of_nodes = self.nodes.gpus if self.nodes is not None else 0
        return next(
            (count for count in reversed(named) if count), of_nodes if self.site.gpus is None else self.site.gpus
        )


def on_gpus(recipe: Recipe, place: Place) -> bool:
    """Whether the job asks for GPUs. Raises RecipeError where a large model would train on CPUs by accident."""
    if recipe.device != "auto":
        return recipe.device == "cuda"
    if place.gpus or place.names_gpus:
        return True
    parameters = sum(model_parameters(recipe).values())
    if parameters > LARGE:
        raise RecipeError(
            f"device = auto: {count_text(parameters)} parameters would train on CPUs, for no GPU of the site is known; "
            "set device=cuda, or device=cpu if that is meant (SBN_GPUS_PER_NODE in slurm/env.sh says what a node has)"
        )
    return False


def choose_ranks(recipe: Recipe, nodes: int, per_node: int | None, place: Place) -> tuple[int, str]:
    """(ranks on each node, a line about them). Raises RecipeError where the recipe cannot have them."""
    gpus = on_gpus(recipe, place)
    ranks, reason = per_node, "as --nproc-per-node says"
    if ranks is None and gpus and place.gpus:
        ranks = _most(recipe, nodes, place.gpus)
        reason = f"one a GPU of {place.gpus} on a node"
    if ranks is None:
        ranks = max(1, min_world_size(recipe) // nodes)
        reason = "one replica of the model over the nodes"
        if gpus:
            reason += ", for the GPUs of a node are not known (SBN_GPUS_PER_NODE in slurm/env.sh)"
    validate_world_size(recipe, nodes * ranks)
    size = f"{nodes} node{'s' * (nodes > 1)} x {ranks} {'GPU' if gpus else 'CPU'} rank{'s' * (ranks > 1)}"
    change = "" if per_node else "; --nproc-per-node G changes it"
    return ranks, f"{size} (device = {recipe.device}): {reason}{change}"


def _most(recipe: Recipe, nodes: int, gpus: int) -> int | None:
    """The most ranks a node, up to one a GPU, that the recipe can be trained on; None where there are none."""
    for ranks in range(gpus, 0, -1):
        try:
            validate_world_size(recipe, nodes * ranks)
        except RecipeError:
            continue
        return ranks
    return None


def asked_of_slurm(recipes: Sequence[Recipe], ranks: int, place: Place) -> tuple[str, ...]:
    """sbatch's options for GPUs and CPUs of a node's ranks; what env.sh or the command names is left to them."""
    gpus = any(on_gpus(recipe, place) for recipe in recipes)
    options = []
    if gpus and not place.names_gpus:
        options.append(f"--gpus-per-node={ranks}")
    if not _NAMES_CPUS.search(place.words):
        options.append(f"--cpus-per-task={ranks * _cpus(ranks, gpus, place)}")
    return tuple(options)


def _cpus(ranks: int, gpus: bool, place: Place) -> int:
    """Of a rank: env.sh's, else as many as are usual, where a node has them."""
    if place.site.cpus is not None:
        return place.site.cpus
    usual = GPU_RANK_CPUS if gpus else CPU_RANK_CPUS
    if place.nodes is None:
        return usual
    return max(1, min(usual, place.nodes.cpus // max(ranks, place.nodes.gpus if gpus else 0)))

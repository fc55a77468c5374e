"""Keys of other training programs that are no options here: a note, or an error that names the remedy."""

from amodal_fusion.errors import ConfigError


def feedforward(value, config):
    if config.init_from:
        return f"dim_feedforward {value} is ignored: the weights of init_from decide"
    if value != 4 * config.width:
        raise ConfigError(f"dim_feedforward: the layers are 4 × width = {4 * config.width} channels wide inside, not "
                          f"{value}; leave the key out, or change width (d_model)")
    return ""


def dropout(value, _):
    if value > 0:
        return f"dropout {value:g} is ignored: this network has no dropout; it relies on augment and weight_decay"
    return ""


def cpu(value, config):
    if value and config.gpus > 0:
        raise ConfigError("cpu: for training on the CPU set gpus to 0", "gpus")
    return ""


def nodes(value, _):
    if value > 1:
        message = "nodes: start the script with PyTorch's launcher on each machine"
        raise ConfigError(message, terminal=f"{message}: torchrun --nnodes {value} --nproc_per_node GPUS "
                                            "--rdzv_backend c10d --rdzv_endpoint HOST:29500 "
                                            "amodal_fusion_transformer.py …")
    return ""


def node_rank(value, _):
    if value > 0:
        message = "node_rank: start the script with PyTorch's launcher, which numbers the machines"
        raise ConfigError(message, terminal=f"{message}: torchrun --nnodes --rdzv_endpoint, or its own --node_rank")
    return ""


# key → (type, function of value and config that returns a note, "" for none, or raises ConfigError)
CONFIG_ALIASES = {"dim_feedforward": (int, feedforward), "dropout": (float, dropout), "cpu": (bool, cpu),
                  "nodes": (int, nodes), "node_rank": (int, node_rank)}

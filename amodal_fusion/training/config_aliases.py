"""Keys of other training programs that are no options of ours: what each means here, or why it cannot be obeyed."""

from amodal_fusion.errors import ConfigError


def feedforward(value, config):
    if value != 4 * config.width:
        raise ConfigError(f"dim_feedforward: layers are 4 × width = {4 * config.width} channels wide inside, not "
                          f"{value}; leave the key out, or change width (d_model)")
    return ""


def dropout(value, _):
    if value > 0:
        return f"dropout {value:g} is not used: this network has none; augment and weight_decay take its part"
    return ""


def cpu(value, config):
    if value and config.gpus > 0:
        raise ConfigError("cpu: training on the CPU is --gpus 0, or gpus: 0 in the YAML file")
    return ""


def nodes(value, _):
    if value > 1:
        raise ConfigError(f"nodes: PyTorch's launcher starts several machines. On each: torchrun --nnodes {value} "
                          "--nproc_per_node GPUS --rdzv_backend c10d --rdzv_endpoint HOST:29500 "
                          "amodal_fusion_transformer.py …")
    return ""


def node_rank(value, _):
    if value > 0:
        raise ConfigError("node_rank: PyTorch's launcher numbers the machines; see torchrun --nnodes and "
                          "--rdzv_endpoint, or its own --node_rank")
    return ""


FOREIGN = {"dim_feedforward": (int, feedforward), "dropout": (float, dropout), "cpu": (bool, cpu),
           "nodes": (int, nodes), "node_rank": (int, node_rank)}

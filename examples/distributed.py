"""Several processes, by DDP or FSDP2: torchrun --nproc-per-node 2 examples/distributed.py [--fsdp]."""

import sys

import torch
import torch.distributed as dist
from digits import loader, make_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler


def main(epochs: int = 10, fsdp: bool = False) -> None:
    if not dist.is_torchelastic_launched():
        sys.exit("start it by: torchrun --nproc-per-node 2 examples/distributed.py")
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if gpu else torch.device("cpu")
    torch.manual_seed(0)  # the same prompts and head in all processes

    model = make_model().to(device)
    dataset = loader(model).dataset
    sampler = DistributedSampler(dataset)
    batches = torch.utils.data.DataLoader(dataset, batch_size=32, sampler=sampler)
    if fsdp:
        mesh = dist.device_mesh.init_device_mesh(device.type, (dist.get_world_size(),))
        for block in model.backbone.blocks:
            fully_shard(block, mesh=mesh)
        network = fully_shard(model, mesh=mesh)
    else:
        network = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.trainable_parameters(), lr=0.2, momentum=0.9)  # after sharding
    torch.manual_seed(dist.get_rank())  # other dropouts in each
    for epoch in range(epochs):
        network.train()
        sampler.set_epoch(epoch)
        for images, labels in batches:
            loss = torch.nn.functional.cross_entropy(network(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    save(model)
    dist.destroy_process_group()


def save(model) -> None:
    """Gather what is learned, and write it in one process."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    learned = get_model_state_dict(model, options=options)
    if dist.get_rank() == 0:
        whole = make_model()
        whole.load_state_dict(learned, strict=False)
        whole.eval().save_adapter("adapter")


if __name__ == "__main__":
    main(fsdp="--fsdp" in sys.argv)

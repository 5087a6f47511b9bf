"""A training script for DeepSpeed as people have them; only its import differs: it was `import deepspeed`.

The configuration beside it names Grass:

deepspeed examples/deepspeed_script.py --deepspeed --deepspeed_config examples/deepspeed_script.json
"""

import argparse

import torch
from torch import nn

from narrowgauge.integrations import deepspeed


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(64, 96)
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(96), nn.Linear(96, 96), nn.GELU()) for _ in range(3))
        self.head = nn.Linear(96, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.embed(images)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--save", default=None)
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    args = parse_args()
    torch.manual_seed(0)
    deepspeed.init_distributed()
    net = Classifier()
    images = torch.randn(512, 64)
    labels = (images @ torch.randn(64, 10)).argmax(1)
    trainset = torch.utils.data.TensorDataset(images, labels)
    parameters = [
        {"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in net.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    engine, _, trainloader, _ = deepspeed.initialize(
        args=args, model=net, model_parameters=parameters, training_data=trainset
    )
    criterion = nn.CrossEntropyLoss()
    for epoch in range(args.epochs):
        total = 0.0
        for inputs, targets in trainloader:
            loss = criterion(engine(inputs.to(engine.device)), targets.to(engine.device))
            engine.backward(loss)
            engine.step()
            total += loss.item()
        if deepspeed.comm.get_rank() == 0:
            print(f"epoch {epoch + 1}: loss {total / len(trainloader)!r}")
    if args.save:
        engine.save_checkpoint(args.save, client_state={"epoch": args.epochs})


if __name__ == "__main__":
    main()

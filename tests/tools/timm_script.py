"""A short script in place of timm's train.py and validate.py, which are in its repository only."""

import argparse
import importlib

import timm
import torch
from timm.models import load_checkpoint
from timm.utils import ParseKwargs

parser = argparse.ArgumentParser()
parser.add_argument("--data-dir")
parser.add_argument("--device-modules", nargs="+", default=[])
parser.add_argument("--model")
parser.add_argument("--pretrained", action="store_true")  # without the download
parser.add_argument("--num-classes", type=int)
parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs)
parser.add_argument("--opt")
parser.add_argument("--lr", type=float)
parser.add_argument("--checkpoint")
args = parser.parse_args()

for module in args.device_modules:
    importlib.import_module(module)
model = timm.create_model(args.model, num_classes=args.num_classes, **args.model_kwargs)
if args.checkpoint:
    load_checkpoint(model, args.checkpoint)
else:
    state = {"arch": args.model, "state_dict": model.state_dict(), "args": args, "version": 2}
    torch.save(state, "model_best.pth.tar")

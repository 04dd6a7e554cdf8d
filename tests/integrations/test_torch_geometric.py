"""PyTorch Geometric: graphs are mixed after their readout, where a graph is one row."""

import torch

import mixupe_kernels as mk

from . import library

pyg = library("torch_geometric")


def graphs(count=32):
    torch.manual_seed(0)
    made = []
    for index in range(count):
        nodes = 4 + index % 3
        edges = torch.stack([torch.arange(nodes), torch.arange(nodes).roll(1)])
        x = torch.randn(nodes, 5, dtype=torch.get_default_dtype()) + index % 3
        made.append(pyg.data.Data(x=x, edge_index=edges, y=torch.tensor([index % 3])))
    return made


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = pyg.nn.GCNConv(5, 16), torch.nn.Linear(16, 3)

    def readout(self, data):
        return pyg.nn.global_mean_pool(self.conv(data.x, data.edge_index).relu(), data.batch)


def test_the_recipe(followed):
    net, mixup_fn = Net(), mk.MixupE(clean_fraction=1 / 4)
    criterion, optimizer = mk.MixupELoss(eta=0.1, clean_weight=1 / 4), torch.optim.Adam(net.parameters(), lr=0.05)
    losses = []
    for _ in range(10):
        for data in pyg.loader.DataLoader(graphs(), 16, shuffle=True):
            hidden, target = mixup_fn(net.readout(data), data.y)
            loss = criterion(net.head(hidden), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert followed.losses == followed.mixed == 10 and losses[-1] < losses[0]
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())

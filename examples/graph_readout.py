"""PyTorch Geometric: graphs have no common shape, so their readouts are mixed: python examples/graph_readout.py

scikit-learn's digits as graphs: a node a lit pixel with its place and grey value, an edge between neighbours. Real sets:
--data MUTAG or another of TUDataset.
"""

import torch
from rich.progress import track
from shared import Curve, arguments
from sklearn.datasets import load_digits
from torch_geometric.data import Data
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GraphConv, global_add_pool

import mixupe_kernels as mk


def digits():
    graphs = []
    for picture, label in zip(*load_digits(return_X_y=True), strict=True):
        picture = torch.tensor(picture.reshape(8, 8) / 16, dtype=torch.get_default_dtype())
        place = (picture > 0.2).nonzero()
        x = torch.cat([picture[place[:, :1], place[:, 1:]], place / 7 - 0.5], 1)
        near = (place.unsqueeze(0) - place.unsqueeze(1)).abs().amax(2) == 1
        graphs.append(Data(x=x, edge_index=near.nonzero().t().contiguous(), y=torch.tensor([int(label)])))
    return graphs


def graphs_of(args):
    if args.data == "digits":
        return digits()
    from torch_geometric.datasets import TUDataset

    return list(TUDataset(args.root, args.data))


class Network(torch.nn.Module):
    def __init__(self, features, classes, width=48):
        super().__init__()
        self.layers = torch.nn.ModuleList(GraphConv(inputs, width) for inputs in (features, width, width))
        self.head = torch.nn.Sequential(torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, classes))

    def readout(self, data):
        x = data.x.to(torch.get_default_dtype())
        for layer in self.layers:
            x = layer(x, data.edge_index).relu()
        return global_add_pool(x, data.batch) / 16


def main():
    args = arguments(__doc__, epochs=20)
    data, curve = graphs_of(args), Curve(args)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0)).tolist()
    count = len(data) // 4
    train = DataLoader([data[i] for i in order[count:]], args.batch_size, shuffle=True, drop_last=True)
    test = DataLoader([data[i] for i in order[:count]], 256)
    net = Network(data[0].x.shape[1], 1 + max(int(graph.y) for graph in data))
    mixup_fn, criterion = mk.MixupE(alpha=0.4, clean_fraction=1 / 4), mk.MixupELoss(eta=1e-3, clean_weight=1 / 4)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for epoch in range(args.epochs):
        losses = []
        for batch in track(train, f"epoch {epoch + 1}", transient=True):
            hidden, target = mixup_fn(net.readout(batch), batch.y)  # a graph is a row from here on
            loss = criterion(net.head(hidden), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        with torch.no_grad():
            wrong = torch.cat([net.head(net.readout(batch)).argmax(1) != batch.y for batch in test])
        curve.add(loss=float(torch.stack(losses).mean()), error=100 * float(wrong.double().mean()))
    curve.save()


if __name__ == "__main__":
    main()

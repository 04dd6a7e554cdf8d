"""Networks that are trained together are those that would be trained alone."""

import torch

import mixupe_kernels as mk
from experiments import batched


def networks(seeds=3, sizes=(5, 8, 4)):
    return batched.Networks(range(seeds), sizes)


def alone(network, seed):
    layers = []
    for weight, bias in zip(network.parameters[::2], network.parameters[1::2], strict=True):
        layer = torch.nn.Linear(weight.shape[1], weight.shape[2])
        layer.weight.data, layer.bias.data = weight[seed].detach().t(), bias[seed, 0].detach()
        layers += [layer, torch.nn.ReLU()]
    return torch.nn.Sequential(*layers[:-1])


def batch(seeds=3, rows=6):
    return torch.randn(seeds, rows, 5), torch.randint(4, (seeds, rows))


def test_each_seed_starts_as_torch_does():
    network, x = networks(), torch.randn(3, 6, 5)
    for seed in range(3):
        torch.manual_seed(seed)
        single = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
        torch.testing.assert_close(network(x)[seed], single(x[seed]))


def test_objectives_are_the_package_s_losses():
    x, labels = batch()
    for objective, eta, gamma in (
        (batched.mixup(0.7), 0.0, 0.0),
        (batched.mixupe(0.7, 0.3), 0.3, 0.0),
        (batched.mixupe(0.7, 0.3, 0.5), 0.3, 0.5),
    ):
        network = networks()
        values = objective(network, x, labels, batched.Draws(range(3)))
        # The same draws again, a seed at a time, through MixedTarget and mixupe_loss.
        draws = batched.Draws(range(3))
        partner = draws.partners(6)
        lam = draws.lam(mk.sampling.Beta(0.7))
        for seed in range(3):
            mixed = mk.mix(x[seed], partner[seed], lam[seed].expand(6))
            rows = torch.cat([mixed, x[seed]]) if eta else mixed
            own, other = labels[seed], labels[seed][partner[seed]]
            weights = torch.cat([lam[seed].expand(6), torch.ones(6)]) if eta else lam[seed].expand(6)
            clean = 6 if eta else 0
            first = torch.cat([own, own]) if eta else own
            second = torch.cat([other, own]) if eta else other
            target = mk.MixedTarget(first, second, weights, 6, clean, mk.expected_a_lambda(0.7))
            loss = mk.mixupe_loss(alone(network, seed)(rows), target, eta=eta, clean_weight=gamma)
            torch.testing.assert_close(values[seed], loss)


def test_training_together_is_training_alone():
    x, labels = batch(rows=20)
    network = batched.trained(networks(), x, labels, batched.mixup(1.0), 3, batch=8)
    for seed in range(3):
        torch.manual_seed(seed)
        single = batched.Networks([seed], (5, 8, 4))
        order, draws = torch.Generator().manual_seed(seed), batched.Draws([seed])
        optimizer = torch.optim.Adam(single.parameters, 1e-3)
        for _ in range(3):
            for rows in torch.randperm(20, generator=order).split(8):
                optimizer.zero_grad()
                batched.mixup(1.0)(
                    single, x[seed : seed + 1, rows], labels[seed : seed + 1, rows], draws
                ).sum().backward()
                optimizer.step()
        for together, own in zip(network.parameters, single.parameters, strict=True):
            torch.testing.assert_close(together[seed], own[0])


def test_partners_stay_within_a_seed():
    x = torch.arange(3.0).view(3, 1, 1).expand(3, 6, 5)
    partner = batched.Draws(range(3)).partners(6)
    assert torch.equal(batched.mix(x, partner, torch.full((3, 6), 0.5)), x)


def test_dropout_is_for_training_only():
    x, labels = batch()
    network = batched.Networks(range(3), (5, 64, 4), dropout=0.5)
    assert not torch.equal(network(x), network(x))
    for trained in batched.train(network, x, labels, batched.erm, 1):
        assert torch.equal(trained(x), trained(x))

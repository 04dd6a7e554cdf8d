"""Transformers: the Trainer with images and with text, accumulation, evaluation, logs and data in dicts."""

import pytest
import torch

import mixupe_kernels as mk

from . import library

transformers = library("transformers")
CLASSES = 4


@pytest.fixture
def Trainer():
    from mixupe_kernels.integrations.transformers import MixupTrainer

    class Mixed(MixupTrainer, transformers.Trainer):
        pass

    return Mixed


def vit():
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=4,
        num_labels=CLASSES,
    )
    return transformers.ViTForImageClassification(config)


def bert(dropout=0.1):
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return transformers.BertForSequenceClassification(config)


def images(count=32):
    return [{"pixel_values": torch.randn(3, 8, 8), "labels": i % CLASSES} for i in range(count)]


def texts(count=32):
    lengths = [3 + i % 5 for i in range(count)]
    return [
        {
            "input_ids": torch.randint(1, 50, (8,)) * (torch.arange(8) < length),
            "attention_mask": (torch.arange(8) < length).long(),
            "labels": i % CLASSES,
        }
        for i, length in enumerate(lengths)
    ]


def arguments(folder, **options):
    options = {"num_train_epochs": 1, "per_device_train_batch_size": 8, **options}
    return transformers.TrainingArguments(
        str(folder),
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        logging_steps=1,
        seed=0,
        **options,
    )


@pytest.mark.parametrize(("model", "data"), [(vit, images), (bert, texts)])
@pytest.mark.parametrize("mixup_fn", [mk.Mixup, mk.MixupE])
def test_a_training_and_its_evaluation(Trainer, model, data, mixup_fn, tmp_path, followed):
    trainer = Trainer(
        model=model(),
        args=arguments(tmp_path, num_train_epochs=3),
        train_dataset=data(),
        eval_dataset=data(16),
        mixup_fn=mixup_fn(0.8),
        criterion=mk.MixupELoss(eta=0.1),
    )
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    trainer.train()
    assert followed.losses == followed.mixed == 10
    unchanged = [name for name, value in trainer.model.named_parameters() if torch.equal(value, before[name])]
    assert unchanged == []  # embeddings of tokens among them
    logs = trainer.state.log_history[0]
    assert {"loss", "mix_loss", "reg", "eta_hat"} <= set(logs)
    metrics = trainer.evaluate()
    labels = torch.tensor([row["labels"] for row in trainer.eval_dataset])
    logits = torch.as_tensor(trainer.predict(trainer.eval_dataset).predictions)
    assert metrics["eval_loss"] == pytest.approx(float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-6)


def test_masks_follow_their_rows(Trainer, tmp_path):
    seen = []

    class Watched(transformers.BertForSequenceClassification):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, **kwargs):
            seen.append((input_ids, attention_mask, inputs_embeds, labels))
            return super().forward(attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs)

    data = texts(8)
    trainer = Trainer(
        model=Watched(bert().config),
        args=arguments(tmp_path, max_steps=1),
        train_dataset=data,
        mixup_fn=mk.MixupE(clean_fraction=1 / 2, generator=torch.Generator().manual_seed(0)),
    )
    trainer.train()
    ((ids, mask, embeds, labels),) = seen
    assert ids is None and labels is None and embeds.shape == (16, 8, 16)
    lengths = mask.sum(1)
    assert sorted(lengths[:8].tolist()) == sorted(3 + i % 5 for i in range(8))  # each sample's own, in the mixed rows
    assert set(lengths[8:].tolist()) <= set(lengths[:8].tolist())


def gradients(Trainer, folder, data, model, steps, size):
    """Of one optimizer step: the parameters' change, by plain SGD of learning rate 1."""
    trainer = Trainer(
        model=model,
        args=arguments(
            folder,
            max_steps=1,
            gradient_accumulation_steps=steps,
            per_device_train_batch_size=size,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
        ),
        train_dataset=data,
        mixup_fn=mk.Mixup(lam_distribution=mk.sampling.Fixed(1.0)),
        criterion=mk.MixupELoss(eta=0.0),
    )
    before = [value.clone() for value in trainer.model.parameters()]
    trainer.train()
    return [old - new.detach() for old, new in zip(before, trainer.model.parameters(), strict=True)]


@pytest.mark.parametrize(("make", "data"), [(vit, images), (lambda: bert(0.0), texts)])
def test_accumulated_steps_are_divided(Trainer, make, data, tmp_path, float64):
    """With λ = 1 the loss is a mean over rows, so four batches of 4 make the gradient of one of 16."""
    torch.manual_seed(0)
    model, data = make(), data(16)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    whole = gradients(Trainer, tmp_path, data, model, 1, 16)
    model.load_state_dict(start)
    parts = gradients(Trainer, tmp_path, data, model, 4, 4)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert max(float(value.abs().max()) for value in whole) > 1e-3


def test_a_target_survives_what_the_trainer_does_to_inputs(Trainer, tmp_path):
    """Its ``training_step`` moves nested inputs to the device: a target mixed by the collate function stays one."""
    collate = mk.Collate(mk.MixupE(clean_fraction=1 / 2), transformers.default_data_collator)
    seen = []

    class Own(transformers.Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            target = inputs.pop("labels")
            seen.append(target)
            return mk.MixupELoss()(model(**inputs).logits, target)

    Own(model=vit(), args=arguments(tmp_path), train_dataset=images(), data_collator=collate).train()
    assert len(seen) == 4 and all(isinstance(t, mk.MixedTarget) and t.num_rows == 16 for t in seen)


def test_the_schedule_is_driven(Trainer, tmp_path):
    mixup_fn = mk.MixupE(warmup_epochs=1)
    trainer = Trainer(
        model=vit(), args=arguments(tmp_path, num_train_epochs=2), train_dataset=images(), mixup_fn=mixup_fn
    )
    trainer.train()
    assert mixup_fn.epoch == 1 and mixup_fn.steps == 4


def test_what_it_refuses(Trainer, tmp_path):
    with pytest.raises(TypeError, match="mixup_fn must be a Mixup or MixupE, got NoneType"):
        Trainer(model=vit(), args=arguments(tmp_path), mixup_fn=None)
    with pytest.raises(TypeError, match="criterion must be a MixupELoss or None, got CrossEntropyLoss"):
        Trainer(model=vit(), args=arguments(tmp_path), mixup_fn=mk.Mixup(), criterion=torch.nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match="compute_loss_func must be None"):
        Trainer(model=vit(), args=arguments(tmp_path), mixup_fn=mk.Mixup(), compute_loss_func=lambda *a, **k: 0)

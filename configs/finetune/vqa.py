r"""Visual question answering: an answer classifier on the multimodal decoder's last text token.

    python -m coca_jax.main --config=configs/finetune/vqa.py --workdir=runs/vqa \
        --config.init.checkpoint=runs/pretrained \
        --config.data.train='folder:/data/vqa/train?question=question&label=answer' \
        --config.data.classes=/data/vqa/answers.txt \
        --config.evaluate.splits="('folder:/data/vqa/val?question=question&label=answer',)"

A line of captions.jsonl is {"image": "1.jpg", "question": "what color is the car?", "answer": "red"}. answers.txt lists
the candidate answers, e.g. the 3,129 commonest of VQA v2. A record with another answer is replaced in training (up to a
share of config.data.max_bad) and counts as wrong in evaluation. All weights are trained. Compare with answering without
the image, which reaches about the score of each question's commonest answer. Use: coca_jax.load(workdir).answer(...).
"""

import ml_collections

from coca_jax.config import default


def get_config() -> ml_collections.ConfigDict:
    c = default()
    c.init.model = "checkpoint"
    c.steps, c.batch_size = 40_000, 256
    c.loss.update(lambda_con=0.0, lambda_cap=0.0, lambda_cls=1.0)
    c.model.head.reads = "decoder"
    c.optimizer.update(name="adamw", peak_lr=2e-5, schedule="cosine", b2=0.999, weight_decay=0.01, warmup=0.1)
    c.data.update(crop_area=(0.8, 1.0), max_bad=0.2)
    c.evaluate.every = 2000
    return c

"""TRL's SFTTrainer with its own peft_config: one more callback, and ranks follow the loss."""

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tsqlora import paper

WORDS = ["<pad>", "<eos>", *(f"w{number}" for number in range(20))]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(WORDS), initializer_range=0.2, eos_token_id=1))


if __name__ == "__main__":
    counting = [{"prompt": f"w{j}", "completion": f" w{(j + 1) % 20} w{(j + 2) % 20}"} for j in range(20)] * 10
    ranks = paper.RankCallback(interval=10)
    trainer = SFTTrainer(
        llama(),
        SFTConfig(
            "sft-run",
            num_train_epochs=12,
            learning_rate=2e-2,
            packing=True,
            max_length=32,
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(counting),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),  # r is the mean rank
        callbacks=[ranks],
    )
    trainer.train()
    trainer.save_model("sft-adapter")

    print("ranks:", {name.removeprefix("model.layers."): rank for name, rank in ranks.final.items()})
    loaded = PeftModel.from_pretrained(llama(), "sft-adapter").eval()
    prompt = tokenizer()("w7", return_tensors="pt")
    answer = loaded.generate(**prompt, max_new_tokens=2, do_sample=False)
    print("plain PEFT counts on:", tokenizer().decode(answer[0]))
